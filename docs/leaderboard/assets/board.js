// A benchmark's page: filters, plot and table over the same lines. Copy buttons work on every page.
"use strict";

const COLORS = { // after Okabe and Ito: told apart by everyone; lighter on dark ground
  light: ["#0072B2", "#C75300", "#008460", "#B5598C", "#8F6A00", "#2D8FC4"],
  dark: ["#4DA3DD", "#FF8A4C", "#2FC49A", "#E39BC4", "#E6B422", "#9AD4F5"],
};
const DARK = matchMedia("(prefers-color-scheme: dark)");
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star"];
const GREY = "#8a929c";
const PAGE_SIZE = 100;
const DRAWN = 40; // methods in one plot: more are neither told apart nor drawn in time

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function signed(number, digits = 2) {
  return (number < 0 ? "\u2212" : "+") + Math.abs(number).toFixed(digits);
}

function addCopyButton(place) {
  const text = place.querySelector("code").textContent;
  const button = element("button", { type: "button", "aria-label": `Copy: ${text}` }, "copy");
  button.addEventListener("click", async () => {
    await copy(text);
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
  place.append(button);
}

async function copy(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  const area = element("textarea", { "aria-hidden": "true", style: "position:fixed;opacity:0" });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy"); // the only way on pages that were opened from a file
  area.remove();
}

function commandBox(text) {
  const box = element("span", { class: "command" }, element("code", {}, text));
  addCopyButton(box);
  return box;
}

function plotLayout(xTitle, yTitle) {
  const style = getComputedStyle(document.documentElement);
  const grid = { gridcolor: style.getPropertyValue("--grid"), zeroline: false, automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
    font: { color: style.getPropertyValue("--text").trim(), size: 13, family: "system-ui, sans-serif" },
    xaxis: { title: { text: xTitle }, ...grid }, yaxis: { title: { text: yTitle }, ...grid },
    margin: { l: 60, r: 20, t: 20, b: 60 }, hoverlabel: { bgcolor: "#2b333e", font: { color: "#fff" } },
  };
}

const PLOT_OPTIONS = { displayModeBar: false, responsive: true };

class Board {
  constructor(data) {
    this.data = data;
    this.axes = axesOf(data);
    this.columns = columnsOf(data);
    this.sort = { column: null, down: true };
    this.limit = PAGE_SIZE;
    this.form = document.getElementById("filters");
    this.fillFilters();
    this.fillHead();
    this.form.addEventListener("input", () => { this.limit = PAGE_SIZE; this.show(); });
    document.getElementById("more").addEventListener("click", () => { this.limit += PAGE_SIZE; this.fillTable(); });
    DARK.addEventListener("change", () => this.draw());
    this.show();
  }

  fillFilters() {
    for (const axis of this.axes) this.form.elements.axis.append(element("option", { value: axis.key }, axis.title));
    for (const key of ["units", "paradigm", "data", "recovery", "budget"]) {
      const values = [...new Set(this.data.lines.filter((line) => line.role !== "dense").map((line) => line[key]))];
      for (const value of values) this.form.elements[key].append(element("option", { value }, value));
    }
  }

  get chosen() {
    const fields = this.form.elements;
    const words = fields.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    return this.data.lines.filter((line) => {
      const text = `${line.arm} ${line.words} ${line.units} ${line.paradigm} ${line.budget}`.toLowerCase();
      if (line.role === "dense") return true;
      if (fields.official.checked && !line.official) return false;
      if (!words.every((word) => text.includes(word))) return false;
      return ["units", "paradigm", "data", "recovery", "budget"].every((key) => !fields[key].value || fields[key].value === line[key]);
    });
  }

  show() {
    this.lines = this.chosen;
    this.draw();
    this.fillTable();
  }

  draw() {
    const axis = this.axes.find((one) => one.key === this.form.elements.axis.value);
    const place = document.getElementById("plot");
    const shown = this.lines.filter((line) => line.value && line.x[axis.key] !== undefined && line.role !== "dense");
    const drawn = best(shown);
    const traces = [...tracesOf(drawn, axis, stylesOf(this.data.lines)), ...frontsOf(shown, axis)];
    const layout = plotLayout(innerWidth < 700 ? axis.words.replace(" (", "<br>(") : axis.words, `${this.data.metric} (%)`);
    const dense = this.data.lines.find((line) => line.role === "dense" && line.value);
    layout.shapes = dense ? denseShapes(dense) : [];
    layout.annotations = dense ? [{ x: 0, xref: "paper", xanchor: "left", y: dense.value[0], yanchor: "bottom", text: "dense", showarrow: false, font: { color: GREY } }] : [];
    layout.legend = innerWidth < 700 ? { orientation: "h", y: -0.25 } : {};
    layout.height = innerWidth < 700 ? 520 + 12 * traces.length : 520;
    if (axis.reversed) layout.xaxis.autorange = "reversed";
    Plotly.react(place, traces, layout, PLOT_OPTIONS);
    if (!place.listens) {
      place.on("plotly_click", (event) => this.open(event.points[0].customdata));
      place.listens = true;
    }
    document.getElementById("plot-caption").textContent =
      `${drawn.length < shown.length ? `Drawn are the ${DRAWN} methods of best rank; the filters choose others. ` : ""}${axis.note} Bars are 95 % intervals over seeds; the band is that of the dense network. Grey: controls; dotted: single weights. Rings and thin stairs: the means that no other point with the same units beats on this axis, by however little (Pareto front). A click on a point opens its line.`;
  }

  open(key) {
    const index = this.sorted().findIndex((line) => keyOf(line) === key);
    if (index >= this.limit) { this.limit = index + 1; this.fillTable(); }
    const row = document.querySelector(`tr[data-key="${CSS.escape(key)}"]`);
    if (!row) return;
    const button = row.querySelector(".opens");
    if (button.getAttribute("aria-expanded") === "false") button.click();
    row.scrollIntoView({ block: "center" });
    button.focus({ preventScroll: true });
  }

  fillHead() {
    const row = element("tr");
    for (const column of this.columns) {
      const button = element("button", { type: "button" }, column.title);
      const cell = element("th", { scope: "col", class: column.number ? "number" : "", "aria-sort": "none", title: column.note || null }, button);
      button.addEventListener("click", () => {
        const down = this.sort.column === column ? !this.sort.down : Boolean(column.number) && !column.up;
        this.sort = { column, down };
        for (const other of row.children) other.setAttribute("aria-sort", "none");
        cell.setAttribute("aria-sort", down ? "descending" : "ascending");
        this.fillTable();
      });
      row.append(cell);
    }
    document.querySelector("#table thead").replaceChildren(row);
  }

  sorted() {
    const { column, down } = this.sort;
    if (!column) return this.lines;
    const missing = (value) => value === undefined || value === null || value === "";
    return [...this.lines].sort((a, b) => {
      const [x, y] = [column.value(a), column.value(b)];
      if (missing(x) || missing(y)) return missing(x) - missing(y);
      const order = typeof x === "number" ? x - y : String(x).localeCompare(String(y));
      return down ? -order : order;
    });
  }

  fillTable() {
    const lines = this.sorted();
    const rows = lines.slice(0, this.limit).map((line) => this.row(line));
    document.querySelector("#table tbody").replaceChildren(...rows);
    document.getElementById("more").hidden = lines.length <= this.limit;
    document.getElementById("shown").textContent =
      `${lines.length} of ${this.data.lines.length} lines${lines.length > this.limit ? `, the first ${this.limit} below` : ""}. Headings sort; the arrow opens a line's records.`;
  }

  row(line) {
    const row = element("tr", { class: line.role, "data-key": keyOf(line) });
    const button = element("button", { type: "button", class: "opens", "aria-expanded": "false", "aria-label": `Records of ${line.arm} ${line.units} ${line.budget}` }, "▸");
    button.addEventListener("click", () => {
      const opened = button.getAttribute("aria-expanded") === "true";
      button.setAttribute("aria-expanded", String(!opened));
      button.textContent = opened ? "▸" : "▾";
      if (opened) row.nextSibling.remove();
      else row.after(this.detail(line));
    });
    this.columns.forEach((column, index) => {
      const content = column.cell(line);
      const cell = element("td", { class: column.number ? "number" : "" }, ...(index === 0 ? [button, content] : [content]));
      row.append(cell);
    });
    return row;
  }

  detail(line) {
    const links = line.records.map(([seed, value, address]) => element("li", {}, element("a", { href: `../${address}` }, `seed ${seed}`), `: ${value.toFixed(2)} %`));
    const failed = line.failures.map(([seed, message, address]) => element("li", { class: "worse" }, element("a", { href: `../${address}` }, `seed ${seed}`), `: failed, ${message}`));
    const papers = line.reported.map((paper) => element("p", {}, `Reported, not ours: ${paper.value.toFixed(2)} % (${paper.source}). ${paper.note}`));
    const state = line.official ? "Official." : `Not official: ${line.reasons.join("; ")}.`;
    return element("tr", { class: "detail" }, element("td", { colspan: this.columns.length },
      element("p", {}, line.words ? `${line.words} ` : "", element("span", { class: "soft" }, state)), element("ul", {}, ...links, ...failed), differences(line), ...papers, commandBox(line.command)));
  }
}

function differences(line) {
  // Of several seeds; the interval that decides (Student's t), and beside it the bootstrap interval.
  const several = Object.entries(line.against).filter(([, found]) => found[5] > 1);
  if (!several.length) return null;
  const items = several.map(([control, [mean, half, verdict, low, high, n]]) => element("li", {},
    `from ${control}: ${signed(mean)} ± ${half.toFixed(2)}, `, element("span", { class: verdict }, verdict), `; bootstrap ${signed(low)} to ${signed(high)} over ${n} seeds`));
  const few = several.some(([, found]) => found[5] < 4) ? " Over three seeds or fewer the latter is just the range of the differences, and covers the true one less often than it says: ± decides." : "";
  return element("div", {}, element("p", {}, `Differences in points, paired by seed: ± is the 95 % interval (Student's t), beside it the bootstrap interval.${few}`), element("ul", {}, ...items));
}

function keyOf(line) {
  return `${line.arm}|${line.units}|${line.budget}`;
}

function axesOf(data) {
  const axes = [
    { key: "macs", title: "MACs", words: "MACs without products with zeros (% of the dense network)", note: "Fewer MACs are to the right; for masked networks they are not time.", reversed: true },
    { key: "sparsity", title: "sparsity", words: "parameters removed or zero (%)", note: "Smaller networks are to the right." },
    { key: "params", title: "parameters", words: "parameters that are not zero (% of the dense network)", note: "Smaller networks are to the right.", reversed: true },
    { key: "bytes", title: "bytes", words: "bytes of tensors (% of the dense network)", note: "Masked networks keep their bytes. Smaller networks are to the right.", reversed: true },
  ];
  for (const engine of data.engines) {
    axes.push({ key: `latency ${engine}`, title: `latency, ${engine}`, words: `median time of a call, ${engine} (% of the dense network)`, note: "Only physically smaller networks are timed, each beside the dense one. Faster is to the right.", reversed: true });
  }
  return axes;
}

function columnsOf(data) {
  const text = (title, of) => ({ title, value: of, cell: of });
  const number = (title, of, shown, note, up = false) => ({ title, value: of, number: true, note, up, cell: (line) => (of(line) === undefined || of(line) === null ? "" : shown(line)) });
  const against = (name) => (line) => line.against[name] && line.against[name][0];
  const difference = (name) => (line) => {
    const [mean, half, verdict] = line.against[name];
    return element("span", { class: verdict, title: verdict }, `${signed(mean)} ± ${half.toFixed(2)}`);
  };
  const columns = [
    { title: "method", value: (line) => line.arm, cell: (line) => (line.page ? element("a", { href: `../methods/${line.page}.html` }, line.arm) : line.arm) },
    text("units", (line) => (line.role === "dense" ? "" : line.units)),
    text("budget", (line) => line.budget),
    number(`${data.metric} (%)`, (line) => line.value && line.value[0], (line) => (line.value[2] > 1 ? `${line.value[0].toFixed(2)} ± ${line.value[1].toFixed(2)}` : line.value[0].toFixed(2)), "mean and 95 % interval over seeds"),
    number("rank", (line) => line.rank, (line) => String(line.rank), "within the budget; arms whose intervals overlap tie", true),
    number("− random", against("random"), difference("random"), "difference from random pruning, seed by seed"),
    number("− scratch", against("scratch-e"), difference("scratch-e"), "difference from the same size trained from new weights"),
    number("MACs (%)", (line) => line.x.macs, (line) => line.x.macs.toFixed(1), "of the dense network, without products with zeros", true),
    number("params (%)", (line) => line.x.params, (line) => line.x.params.toFixed(1), "that are not zero", true),
  ];
  if (data.lines.some((line) => line.effective !== null)) {
    columns.push(number("effective sparsity (%)", (line) => line.effective, (line) => line.effective.toFixed(2), "parameters that are zero or cut off from the output, by masks"));
  }
  for (const engine of data.engines) {
    columns.push(number(`speed, ${engine}`, (line) => line.speedup[engine] && line.speedup[engine][0], (line) => `${line.speedup[engine][0].toFixed(2)}×`, "times faster than the dense network"));
  }
  if (data.lines.some((line) => line.reported.length)) {
    columns.push(number("reported (%)", (line) => line.reported[0] && line.reported[0].value, (line) => element("span", { title: line.reported[0].source }, line.reported[0].value.toFixed(2)), "a paper's figure, never mixed with ours"));
  }
  columns.push(text("paradigm", (line) => (line.role === "dense" ? "" : line.paradigm)), text("data", (line) => (line.role === "dense" ? "" : line.data)), text("recovery", (line) => line.recovery));
  columns.push(number("seeds", (line) => line.records.length, (line) => String(line.records.length)));
  columns.push({ title: "status", value: (line) => (line.official ? "official" : "unofficial"), cell: (line) => element("span", { title: line.reasons.join("; ") || null }, line.failures.length && !line.records.length ? "failed" : line.official ? "official" : "unofficial") });
  return columns;
}

function stylesOf(lines) {
  const names = [...new Set(lines.filter((line) => line.role === "method").map((line) => line.arm))].sort();
  const colors = DARK.matches ? COLORS.dark : COLORS.light;
  const styles = new Map(names.map((name, i) => [name, { color: colors[i % colors.length], symbol: SYMBOLS[Math.floor(i / colors.length) % SYMBOLS.length] }]));
  const controls = [...new Set(lines.filter((line) => line.role === "control").map((line) => line.arm))].sort();
  controls.forEach((name, i) => styles.set(name, { color: GREY, symbol: SYMBOLS[i % SYMBOLS.length] + "-open", dash: ["dash", "dot", "dashdot"][i % 3] }));
  return styles;
}

function best(lines) {
  // The controls, and as many methods as a plot can show: those that rank best at one of their budgets.
  const ranks = new Map();
  for (const line of lines) if (line.role === "method") ranks.set(line.arm, Math.min(line.rank ?? Infinity, ranks.get(line.arm) ?? Infinity));
  const chosen = new Set([...ranks.keys()].sort((a, b) => ranks.get(a) - ranks.get(b)).slice(0, DRAWN));
  const of = (line) => line.arm.split("+")[0]; // a sanity check is drawn with its method
  return lines.filter((line) => (line.role === "method" || ranks.has(of(line)) ? chosen.has(of(line)) : true));
}

function tracesOf(lines, axis, styles) {
  const groups = new Map();
  for (const line of lines) {
    const name = `${line.arm}, ${line.units}`;
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(line);
  }
  const named = new Set(); // one entry of the legend per method, whatever its units
  return [...groups].map(([name, members]) => {
    members.sort((a, b) => a.x[axis.key] - b.x[axis.key]);
    const { arm } = members[0];
    const style = styles.get(arm);
    const showlegend = !named.has(arm);
    named.add(arm);
    return {
      name: arm, legendgroup: arm, showlegend, type: "scatter", mode: "lines+markers",
      x: members.map((line) => line.x[axis.key]), y: members.map((line) => line.value[0]),
      error_y: {
        symmetric: false, thickness: 1.3, width: 4, color: style.color, // a share ends at 0 and 100 %, its interval too
        array: members.map((line) => Math.min(line.value[1], 100 - line.value[0])),
        arrayminus: members.map((line) => Math.min(line.value[1], line.value[0])),
      },
      customdata: members.map(keyOf), text: members.map((line) => `${line.budget}, ${line.records.length} seeds, ${line.official ? "official" : "unofficial"}`),
      hovertemplate: "%{x:.3g} %, %{y:.2f} %<br>%{text}<extra>" + name + "</extra>",
      marker: { size: 9, color: style.color, symbol: style.symbol }, line: { color: style.color, width: 1.6, dash: style.dash || (members[0].units === "weight" ? "dot" : "solid") },
    };
  });
}

function frontOf(points) {
  // The points [cost, value] that no other beats, from the cheapest on: as pareto_front in secateur.bench.statistics.
  const front = [];
  for (const point of [...points].sort((a, b) => a[0] - b[0] || b[1] - a[1])) {
    const last = front.at(-1);
    if (!last || point[1] > last[1] || (point[0] === last[0] && point[1] === last[1])) front.push(point);
  }
  return front;
}

function frontsOf(lines, axis) {
  const color = getComputedStyle(document.documentElement).getPropertyValue("--text").trim();
  return [...new Set(lines.map((line) => line.units))].map((units) => {
    const costs = lines.filter((line) => line.units === units).map((line) => [axis.reversed ? line.x[axis.key] : -line.x[axis.key], line.value[0]]);
    const front = frontOf(costs);
    const name = `Pareto front, ${units}`;
    return {
      name, legendrank: 1, type: "scatter", mode: "lines+markers", hoverinfo: "skip", opacity: 0.65,
      x: front.map(([cost]) => Math.abs(cost)), y: front.map(([, value]) => value),
      marker: { size: 16, symbol: "circle-open", color, line: { width: 1.2 } }, line: { color, width: 1, shape: "hv", dash: units === "weight" ? "dot" : "solid" },
    };
  });
}

function denseShapes(dense) {
  const [mean, half] = dense.value;
  const across = { xref: "paper", x0: 0, x1: 1, layer: "below" };
  return [
    { type: "rect", ...across, y0: mean - half, y1: mean + half, fillcolor: GREY, opacity: 0.18, line: { width: 0 } },
    { type: "line", ...across, y0: mean, y1: mean, line: { color: GREY, dash: "dot" } },
  ];
}

document.querySelectorAll(".command").forEach(addCopyButton);
const content = document.getElementById("board");
if (content) new Board(JSON.parse(content.textContent));
