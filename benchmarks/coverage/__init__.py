"""How much of what people use can be pruned: python -m benchmarks.coverage [--only PATTERNS] [--jobs N].

One small network of every timm module family, torchvision's classification and segmentation networks, tiny
configurations of Hugging Face architectures, and the 62 architectures of `peers.json`. Each is traced, verified, pruned
to half its MACs with proof, judged, trained for one step, saved, loaded in another process, exported to ONNX and run
there. Then Torch-Pruning prunes half of its channels, before the same judge. Needs timm, torchvision, transformers and
torch-pruning. Results: `results/coverage/`.
"""
