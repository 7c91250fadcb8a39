// One record: its address names the data file and the id, record.html#digits-resnet8-0/4244c163ab1b6938.
"use strict";

const place = document.getElementById("record");

function table(head, rows, label) {
  const cell = (tag, text, i) => element(tag, { class: i ? "number" : "", scope: tag === "th" ? "col" : null }, text);
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, element("table", {},
    element("thead", {}, element("tr", {}, ...head.map((text, i) => cell("th", text, i)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((text, i) => cell("td", text, i)))))));
}

function section(title, ...children) {
  return element("section", {}, element("h2", {}, title), ...children);
}

function change(before, after) {
  return before ? `${signed(100 * (after / before - 1), 1)} %` : "";
}

function sizes(measured) {
  const names = { params: "parameters", nonzero_params: "parameters that are not zero", macs: "MACs, dense", effective_macs: "MACs without products with zeros", bytes: "bytes of tensors" };
  const rows = Object.entries(names).map(([key, words]) => [words, measured.before[key].toLocaleString("en"), measured.after[key].toLocaleString("en"), change(measured.before[key], measured.after[key])]);
  return section("Cost", table(["", "before", "after", "change"], rows, "Cost"));
}

function latency(machine) {
  const rows = Object.values(machine.latency).map((t) => [`${t.engine}, ${t.threads} thread${t.threads > 1 ? "s" : ""}, batch ${t.batch}, ${t.dtype}`, t.dense.p50_ms.toFixed(2), t.pruned.p50_ms.toFixed(2), t.dense.p90_ms.toFixed(2), t.pruned.p90_ms.toFixed(2), `${(t.dense.p50_ms / t.pruned.p50_ms).toFixed(2)}×`]);
  return rows.length ? section("Time of a call", table(["engine", "dense, median (ms)", "pruned, median (ms)", "dense, p90", "pruned, p90", "faster"], rows, "Latency")) : null;
}

function widths(measured) {
  const rows = Object.entries(measured.widths).map(([name, [before, after]]) => [name, String(before), String(after)]);
  return rows.length ? section("Widths", table(["axis", "before", "after"], rows, "Widths")) : null;
}

function tiles(record) {
  const { measured, run, machine } = record;
  const metric = measured.metrics[run.metric];
  const percent = (share) => `${(100 * share).toFixed(2)} %`;
  const list = [[percent(metric.value), `${run.metric} on ${metric.n.toLocaleString("en")} test samples (${percent(metric.low)} to ${percent(metric.high)})`], [percent(measured.dense_metric), "the dense network, same seed"]];
  if (run.role !== "dense") {
    list.push([change(measured.before.effective_macs, measured.after.effective_macs), "MACs without products with zeros"]);
    list.push([`${(100 * measured.effective_sparsity || 100 * measured.sparsity).toFixed(1)} %`, "of the parameters gone, zero or cut off"]);
  }
  if (measured.proof !== null) list.push([measured.proof.toExponential(0), "largest relative difference between cut and masked network"]);
  list.push([`${(machine.seconds.total || 0).toFixed(0)} s`, "wall time"]);
  return element("ul", { class: "tiles" }, ...list.map(([value, words]) => element("li", {}, element("b", {}, value), element("span", {}, words))));
}

function curve(record) {
  const history = record.measured.history;
  if (!history.length) return null;
  const box = element("div", { role: "img", "aria-label": "Training curve" });
  requestAnimationFrame(() => {
    const of = (key, scale, name) => {
      const points = history.filter((entry) => entry[key] !== undefined);
      return { name, x: points.map((p) => p.step), y: points.map((p) => scale * p[key]), mode: "lines+markers" };
    };
    const layout = plotLayout("optimizer steps", "validation accuracy (%)");
    layout.yaxis2 = { ...layout.yaxis, title: { text: "training loss" }, overlaying: "y", side: "right", showgrid: false };
    layout.legend = { orientation: "h", y: -0.3 };
    layout.height = 380;
    layout.margin.r = 60;
    Plotly.newPlot(box, [{ ...of("validation", 100, "validation accuracy"), line: { color: "#0072B2" } }, { ...of("train_loss", 1, "training loss"), yaxis: "y2", mode: "lines", line: { color: "#D55E00" } }], layout, PLOT_OPTIONS);
  });
  return section(record.run.role === "dense" ? "Training" : "Recovery", element("figure", {}, box));
}

function facts(pairs) {
  return element("dl", { class: "facts wide" }, ...pairs.filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))));
}

function provenance({ record, file, reasons }) {
  const { run, code, machine } = record;
  return section("Where it comes from", facts([
    ["record", record.id], ["file", file], ["recipe", run.recipe_hash], ["seed", run.seed], ["splits", run.data], ["secateur", code.version],
    ["commit", code.commit ? code.commit.slice(0, 12) + (code.clean ? "" : " with changes") : "unknown"], ["made", machine.created],
    ["peak memory", machine.peak_memory_bytes ? `${(machine.peak_memory_bytes / 2 ** 20).toFixed(0)} MiB` : null],
    ...Object.entries(machine.environment),
  ]), element("p", {}, reasons.length ? `Not official: ${reasons.join("; ")}.` : "Official."));
}

function reported(record) {
  const rows = record.reported.map((paper) => [`${paper.source}. ${paper.note}`, (100 * paper.value).toFixed(2)]);
  return rows.length ? section("Reported by papers, not measured here", table(["source", "value (%)"], rows, "Reported")) : null;
}

function show(found) {
  const { record, command, label, page } = found;
  document.title = `${label} · secateur`;
  const parts = [
    element("p", { class: "crumb" }, element("a", { href: "index.html" }, "Leaderboard"), " / ", element("a", { href: page }, record.run.benchmark)),
    element("h1", {}, label), element("p", {}, commandBox(command)),
  ];
  if (record.status === "ok") parts.push(tiles(record), sizes(record.measured), latency(record.machine), curve(record), widths(record.measured));
  else parts.push(element("p", { class: "error" }, `Failed: ${record.error.type}: ${record.error.message}`), element("details", {}, element("summary", {}, "Traceback"), element("pre", { tabindex: "0" }, element("code", {}, record.error.traceback))));
  parts.push(reported(record), provenance(found), element("details", {}, element("summary", {}, "The whole record"), element("pre", { tabindex: "0" }, element("code", {}, JSON.stringify(record, null, 1)))));
  place.replaceChildren(...parts.filter(Boolean));
}

function load() {
  const [file, id] = decodeURIComponent(location.hash.slice(1)).split("/");
  const missing = () => place.replaceChildren(element("p", { class: "error" }, "There is no such record here. Open it from a benchmark's page."));
  if (!/^[\w.-]+$/.test(file || "") || !id) return missing();
  window.secateurRecords = (records) => (records[id] ? show(records[id]) : missing());
  document.head.append(element("script", { src: `data/${file}.js`, onerror: missing }));
}

addEventListener("hashchange", load);
load();
