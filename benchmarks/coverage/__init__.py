"""How much of what people use can be pruned: python -m benchmarks.coverage [--only PATTERN] [--jobs N].

One small network of every timm module family, torchvision's classification and segmentation networks, and tiny
configurations of Hugging Face architectures. Each is traced, verified, pruned to half its MACs with proof, trained for
one step, saved, loaded in a fresh process and exported to ONNX. Needs timm, torchvision and transformers.
"""
