// The table of layers, and what unfolds below a row.

const COLUMNS = [
  {title: "#", value: layer => layer.position, text: layer => String(layer.position), numeric: true},
  {title: "layer", value: layer => layer.module || layer.node, cell: layer => element("td", {class: "name", title: layer.module}, layer.module || layer.node)},
  {title: "operator", value: layer => layer.label ?? layer.product?.operator ?? "", cell: layer => element("td", {class: "muted"}, layer.label ?? layer.product?.operator ?? NONE)},
  {title: "SQNR dB", value: layer => number(layer.noise?.sqnr), text: layer => decibels(layer.noise?.sqnr), numeric: true, meter: "var(--accent)"},
  {title: "own dB", value: layer => number(layer.noise?.own_sqnr), text: layer => decibels(layer.noise?.own_sqnr), numeric: true},
  {title: "weight dB", value: layer => number(layer.weight?.sqnr), text: layer => decibels(layer.weight?.sqnr), numeric: true},
  {title: "shift", value: layer => layer.noise?.shift, text: layer => percent(layer.noise?.shift), numeric: true},
  {title: "output range", value: layer => (layer.output ? layer.output.hi - layer.output.lo : null), text: layer => (layer.output ? `${significant(layer.output.lo)} … ${significant(layer.output.hi)}` : NONE), numeric: true},
  {title: "acc. bits", value: layer => layer.product?.accumulator_bits, text: layer => count(layer.product?.accumulator_bits), numeric: true},
  {title: "MACs", value: layer => layer.product?.macs, text: layer => short(layer.product?.macs), numeric: true},
  {title: "bytes", value: layer => layer.product?.weight_bytes, text: layer => count(layer.product?.weight_bytes), numeric: true},
  {title: "time", value: layer => layer.product?.nanoseconds, text: layer => time(layer.product?.nanoseconds) + (layer.product?.timed_with.length > 1 ? " *" : ""), numeric: true, meter: "var(--integer)"},
];
const table = {sort: 0, descending: false, open: null, largest: new Map()};

function drawLayers() {
  const head = element("tr", {}, ...COLUMNS.map((column, i) => element("th", {class: `sortable${column.numeric ? " n" : ""}`, onclick: () => sortBy(i)}, column.title)));
  byId("layer-table").append(element("thead", {}, head), element("tbody"));
  COLUMNS.forEach((column, i) => {
    if (column.meter) table.largest.set(i, Math.max(...layers.map(column.value).filter(v => known(v) && Number.isFinite(v)), 1e-9));
  });
  byId("filter").addEventListener("input", drawRows);
  drawRows();
}

function sortBy(i) {
  table.descending = table.sort === i ? !table.descending : Boolean(COLUMNS[i].meter) && i !== 3;
  table.sort = i;
  drawRows();
}

function drawRows() {
  const column = COLUMNS[table.sort], wanted = byId("filter").value.toLowerCase();
  const shown = layers.filter(layer => `${layer.node} ${layer.module} ${layer.label ?? ""}`.toLowerCase().includes(wanted));
  const order = (a, b) => {
    const [x, y] = [column.value(a), column.value(b)];
    if (!known(x) || !known(y)) return known(y) - known(x);
    return (x < y ? -1 : x > y ? 1 : 0) * (table.descending ? -1 : 1);
  };
  byId("layer-table").querySelectorAll("th").forEach((th, i) => {
    if (i === table.sort) th.setAttribute("aria-sort", table.descending ? "descending" : "ascending");
    else th.removeAttribute("aria-sort");
  });
  byId("layer-table").tBodies[0].replaceChildren(...[...shown].sort(order).flatMap(layer => (layer.node === table.open ? [layerRow(layer), detailRow(layer)] : [layerRow(layer)])));
  const bands = layers.some(layer => layer.product?.timed_with.length > 1);
  byId("layer-count").textContent = `${shown.length} of ${layers.length} layers` + (bands ? ";  * time of several layers that run as one" : "");
}

function layerRow(layer) {
  return element("tr", {class: layer.node === table.open ? "row chosen" : "row", "data-layer": layer.node, onclick: () => toggleLayer(layer.node)}, ...COLUMNS.map((column, i) => {
    if (column.cell) return column.cell(layer);
    const value = column.value(layer);
    const share = column.meter && known(value) && Number.isFinite(value) ? Math.max(0, Math.min(1, value / table.largest.get(i))) : null;
    const meter = column.meter ? element("span", {class: "meter"}, share === null ? null : element("i", {style: `width: ${100 * share}%; background: ${column.meter}`})) : null;
    return element("td", {class: column.numeric ? "n" : ""}, column.text(layer), meter);
  }));
}

function toggleLayer(node) {
  table.open = table.open === node ? null : node;
  drawRows();
}

/** Open a layer's row; `scroll` to it too. */
function chooseLayer(node, scroll) {
  if (!layerNamed.has(node)) return;
  table.open = node;
  byId("filter").value = "";
  drawRows();
  if (scroll) byId("layer-table").querySelector(`[data-layer="${CSS.escape(node)}"]`)?.scrollIntoView({block: "center"});
}

function detailRow(layer) {
  const {product, noise, weight} = layer, kernels = (report.resources.steps ?? []).filter(step => step.layers?.includes(layer.node)).map(step => step.kernel);
  const facts = [["node", layer.node], ["output", sampleShape(layer.shape ?? "")], ["MACs", count(product?.macs)], ["weight", `${count(product?.weight_bytes)} bytes, saved in ${count(product?.stored_bytes)}`],
    ["accumulator", product ? `${product.accumulator_bits} bits of 32, proven` : NONE], ["weight error", weight ? `${significant(weight.largest_error)}, at most ${significant(weight.bound)}` : NONE],
    ["accumulated", `${decibels(noise?.sqnr)} dB, ${percent(noise?.shift)} of the noise is a shift`], ["own", `${decibels(noise?.own_sqnr)} dB`], ["kernel", [...new Set(kernels)].join(", ") || NONE],
    ["time", product?.timed_with.length > 1 ? `${time(product.nanoseconds)} for ${product.timed_with.join(", ")} together` : time(product?.nanoseconds)]];
  const pictures = [["Weights", layer.weights, null], ["Input codes", layer.input?.histogram, layer.input], ["Output codes", layer.output?.histogram, layer.output]].filter(([, histogram]) => histogram);
  return element("tr", {class: "detail"}, element("td", {colspan: COLUMNS.length},
    element("div", {class: "detail-grid"}, element("dl", {}, ...facts.filter(([, text]) => text && text !== NONE).flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)])),
      element("div", {class: "histograms"}, ...pictures.map(([title, histogram, tensor]) => picture(title, histogram, tensor)))), effectsTable(layer)));
}

function picture(title, histogram, tensor) {
  const note = `${significant(histogram.lo)} … ${significant(histogram.hi)} seen, ${significant(histogram.range_lo)} … ${significant(histogram.range_hi)} representable` +
    (tensor ? `, ${tensor.chosen_by}` : "") + `; ${percent(histogram.outside)} saturate` + (tensor && known(tensor.sqnr) ? `; ${decibels(tensor.sqnr)} dB as codes` : "");
  return element("div", {}, element("h4", {}, tensor ? `${title}: ${tensor.node}` : title), histogramChart(histogram), element("p", {}, note));
}

/** Bars of square-rooted counts, so that tails can be seen; the shaded band is what the codes reach. */
function histogramChart({lo, hi, counts, range_lo, range_hi}) {
  const width = 300, height = 96, base = 82;
  const low = Math.min(lo, range_lo), high = Math.max(hi, range_hi), x = value => 4 + (width - 8) * ((value - low) / (high - low || 1));
  const most = Math.sqrt(Math.max(...counts, 1)), bin = (hi - lo) / counts.length;
  const chart = shape("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "histogram"});
  chart.append(shape("rect", {x: x(range_lo), y: 4, width: Math.max(1, x(range_hi) - x(range_lo)), height: base - 4, fill: "#eaf0fb"}));
  counts.forEach((n, i) => {
    const from = lo + bin * i, middle = from + bin / 2, inside = middle >= range_lo && middle <= range_hi;
    const tall = (base - 10) * Math.sqrt(n) / most;
    if (n) chart.append(shape("rect", {x: x(from), y: base - tall, width: Math.max(1, x(from + bin) - x(from) - 0.4), height: tall, fill: inside ? "#2457c5" : "#c23b4e"}));
  });
  chart.append(shape("line", {x1: 4, x2: width - 4, y1: base, y2: base, stroke: "#aab4c2"}));
  for (const [value, anchor] of [[range_lo, "start"], [range_hi, "end"]]) chart.append(shape("text", {x: x(value), y: height - 2, "text-anchor": anchor}, significant(value)));
  if (low < 0 && high > 0 && x(0) > 52 && x(0) < width - 52) chart.append(shape("text", {x: x(0), y: height - 2, "text-anchor": "middle"}, "0"));
  return chart;
}

function effectsTable(layer) {
  if (!layer.effects.length) return null;
  const pair = (before, after) => (known(before) || known(after) ? `${decibels(before)} → ${decibels(after)}` : "");
  const change = (before, after) => (known(before) && known(after) && number(after) - number(before) > 0.05 ? "up" : known(before) && known(after) && number(after) - number(before) < -0.05 ? "down" : "");
  const rows = layer.effects.map(effect => element("tr", {}, element("td", {class: "name"}, effect.pass_name), element("td", {}, effect.done.join("; ") || element("span", {class: "muted"}, "not touched; what changed before it reaches here")),
    element("td", {class: "n"}, pair(effect.weight_before, effect.weight_after)),
    element("td", {class: `n ${change(effect.sqnr_without, effect.sqnr)}`}, pair(effect.sqnr_without, effect.sqnr)),
    element("td", {class: "n"}, known(effect.shift) ? `${percent(effect.shift_without)} → ${percent(effect.shift)}` : "")));
  return element("table", {class: "data effects"}, element("thead", {}, element("tr", {}, element("th", {}, "pass"), element("th", {}, "what it did here"), element("th", {class: "n"}, "weight dB, before → after"),
    element("th", {class: "n"}, "output dB, without → with"), element("th", {class: "n"}, "shift, without → with"))), element("tbody", {}, ...rows));
}
