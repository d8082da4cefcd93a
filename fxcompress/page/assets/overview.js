// The summary cards and the picture of where the accuracy goes.

function drawSummary() {
  byId("subject").textContent = `${report.target} on the ${report.backend} backend`;
  const steps = report.resources.steps ?? [];
  const spent = steps.every(step => known(step.nanoseconds)) && steps.length ? steps.reduce((sum, step) => sum + step.nanoseconds, 0) : null;
  const widest = Math.max(...report.products.map(product => product.accumulator_bits));
  const card = (label, value, unit, note, good) => element("div", {class: "card"}, element("div", {class: "label"}, label),
    element("div", {class: good ? "value good" : "value"}, value, unit ? element("small", {}, ` ${unit}`) : null), element("div", {class: "note"}, note));
  const split = text => (text.includes(" ") ? text.split(" ") : [text, ""]);
  byId("summary").append(
    card("Output SQNR", report.output_sqnr.map(decibels).slice(0, 3).join(", ") || NONE, "dB", "against the float network, on the example"),
    card("Size", ...split(bytes(report.integer_bytes)), `float ${bytes(report.float_bytes)}, saved ${bytes(report.stored_bytes)}`),
    card("One sample", short(report.macs), "MACs", `${count(report.parameters)} parameters`),
    card("Native time", ...split(time(spent)), spent === null ? "not measured" : `batch 1, ${report.resources.threads} thread${report.resources.threads > 1 ? "s" : ""}, arena ${bytes(report.resources.arena_bytes)}`),
    card("Compiled in", ...split(seconds(report.seconds.total - (report.seconds["measuring passes"] ?? 0))), known(report.seconds["measuring passes"]) ? `and ${seconds(report.seconds["measuring passes"])} of measuring` : "all passes and the proof"),
    report.certificate ? card("Integer-only", "proven", "", report.products.length ? `accumulators of ${widest} bits at most` : "nothing multiplies", true) : card("Integer-only", "not proven", "", "the passes were cut short"),
  );
  byId("certificate").textContent = report.certificate?.text ?? "";
}

const WITHOUT_COLORS = ["#b4552d", "#8a63b8", "#7a7f2a", "#a23b72", "#4f7a28", "#6b6b6b"];

function drawAccuracy() {
  const measured = layers.filter(layer => layer.noise);
  if (!measured.length) {
    byId("accuracy-lead").textContent = "Not measured: compile with measure_passes=True or a debug folder.";
    byId("accuracy-chart").parentElement.hidden = true;
    return;
  }
  const lowest = [...measured].sort((a, b) => number(a.noise.own_sqnr) - number(b.noise.own_sqnr)).slice(0, 3);
  byId("accuracy-lead").replaceChildren("Along the network, the SQNR of every layer's output. The line is what has accumulated up to there; a dot is what the layer alone would do. ",
    "The layers that lose most by themselves: ", ...lowest.flatMap((layer, i) => [i ? ", " : "", element("b", {}, layer.module || layer.node), ` (${decibels(layer.noise.own_sqnr)} dB)`]), ".");
  const alternatives = report.passes.filter(pass => pass.output_sqnr_without).map((pass, i) => ({pass, color: WITHOUT_COLORS[i % WITHOUT_COLORS.length], on: false}));
  const redraw = () => byId("accuracy-chart").replaceChildren(accuracyChart(measured, alternatives.filter(a => a.on)));
  byId("accuracy-legend").append(
    element("span", {class: "key"}, element("i", {class: "stroke", style: "border-color: var(--accent)"}), "accumulated"),
    element("span", {class: "key"}, element("i", {class: "round", style: "background: #e08a2e"}), "own"),
    element("span", {class: "key"}, element("i", {class: "round", style: "background: #b9c2cf"}), "weight"),
    alternatives.length ? element("span", {style: "margin-left: 14px"}, "compare:") : null,
    ...alternatives.map(alternative => element("button", {class: "key", "aria-pressed": "false", onclick: event => {
      alternative.on = !alternative.on;
      event.currentTarget.setAttribute("aria-pressed", alternative.on);
      redraw();
    }}, element("i", {class: "stroke dashed", style: `border-color: ${alternative.color}`}),
    alternative.pass.without === "left out" ? `without ${alternative.pass.name}` : `${alternative.pass.name}: ${alternative.pass.without}`)));
  redraw();
}

function accuracyChart(rows, alternatives) {
  const width = 1310, height = 300, left = 44, right = 16, top = 12, bottom = 92;
  const without = (layer, name) => layer.effects.find(effect => effect.pass_name === name)?.sqnr_without ?? layer.noise.sqnr;
  const finite = value => Number.isFinite(number(value));
  const all = rows.flatMap(row => [row.noise.sqnr, row.noise.own_sqnr, row.weight?.sqnr, ...alternatives.map(a => without(row, a.pass.name))]).filter(v => known(v) && finite(v)).map(number);
  if (!all.length) all.push(0, 50);  // every layer is exact
  const lo = Math.floor(Math.min(...all) / 5) * 5, hi = Math.ceil(Math.max(...all) / 5) * 5;
  const slot = (width - left - right) / rows.length;
  const x = i => left + slot * (i + 0.5);
  const y = v => top + (height - top - bottom) * (1 - (Math.min(number(v), hi) - lo) / (hi - lo || 1));
  const chart = shape("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "SQNR of every layer along the network"});
  const grid = shape("g", {class: "grid"});
  const step = hi - lo > 40 ? 10 : 5;
  for (let v = Math.ceil(lo / step) * step; v <= hi; v += step) grid.append(shape("line", {x1: left, x2: width - right, y1: y(v), y2: y(v)}), shape("text", {x: left - 8, y: y(v) + 4, "text-anchor": "end"}, v + step > hi ? `${v} dB` : String(v)));
  chart.append(grid);
  rows.forEach((row, i) => {
    if (finite(row.noise.own_sqnr)) chart.append(shape("line", {x1: x(i), x2: x(i), y1: y(row.noise.sqnr), y2: y(row.noise.own_sqnr), stroke: "#f0d3b3"}));
  });
  const line = (values, attributes) => shape("polyline", {points: values.map((v, i) => `${x(i)},${y(v)}`).join(" "), fill: "none", "stroke-linejoin": "round", ...attributes});
  for (const {pass, color} of alternatives) chart.append(line(rows.map(row => without(row, pass.name)), {stroke: color, "stroke-width": 1.5, "stroke-dasharray": "5 4"}));
  chart.append(line(rows.map(row => row.noise.sqnr), {stroke: "var(--accent)", "stroke-width": 2}));
  const radius = Math.max(1.6, Math.min(4, slot / 4));
  rows.forEach((row, i) => {
    if (row.weight && finite(row.weight.sqnr)) chart.append(shape("circle", {cx: x(i), cy: y(row.weight.sqnr), r: radius * 0.75, fill: "#b9c2cf"}));
    if (finite(row.noise.own_sqnr)) chart.append(shape("circle", {cx: x(i), cy: y(row.noise.own_sqnr), r: radius, fill: "#e08a2e"}));
    chart.append(shape("circle", {cx: x(i), cy: y(row.noise.sqnr), r: radius * 0.8, fill: "var(--accent)"}));
  });
  const names = briefly(rows.map(row => row.module || row.node));
  const every = Math.max(1, Math.ceil(13 / slot));
  rows.forEach((row, i) => {
    if (i % every === 0) chart.append(shape("text", {transform: `translate(${x(i) + 4} ${height - bottom + 14}) rotate(-45)`, "text-anchor": "end"}, tail(names[i], 20)));
    chart.append(shape("rect", {class: "hit", x: left + slot * i, y: top, width: slot, height: height - top - bottom, onclick: () => chooseLayer(row.node, true),
      onmousemove: event => tooltip.show(event, bold(row.module || row.node), `${row.label ?? ""}  ${sampleShape(row.shape ?? "")}`, `accumulated ${decibels(row.noise.sqnr)} dB, own ${decibels(row.noise.own_sqnr)} dB, weight ${decibels(row.weight?.sqnr)} dB`,
        ...row.effects.filter(e => known(e.sqnr_without)).map(e => `${e.pass_name}: ${decibels(e.sqnr_without)} → ${decibels(e.sqnr)} dB`)), onmouseleave: tooltip.hide}));
  });
  return chart;
}

/** Module names without the first and the last component that nearly all of them share. */
function briefly(names) {
  const most = component => {
    const counts = new Map();
    for (const name of names) if (name.includes(".")) counts.set(component(name), (counts.get(component(name)) ?? 0) + 1);
    return [...counts].find(([, n]) => n > 0.8 * names.length)?.[0];
  };
  const first = most(name => name.split(".")[0] + "."), last = most(name => "." + name.split(".").at(-1));
  return names.map(name => {
    if (first && name.startsWith(first)) name = name.slice(first.length);
    return last && name.endsWith(last) ? name.slice(0, -last.length) : name;
  });
}

const tail = (text, length) => (text.length > length ? `…${text.slice(1 - length)}` : text);
