// What the page shows: the report, joined by layer. Nothing is computed here that the report does not hold, but sums and differences.

const {report, graphs} = JSON.parse(byId("data").textContent);

/** The nodes of a stage of the graph. */
const stageNodes = stage => stage.nodes.map(position => graphs.nodes[position]);
const passNamed = name => report.passes.find(pass => pass.name === name);

/** The last float graph: its tensors are the ones that ranges, histograms and activations are told of. */
const floatStage = graphs.stages.filter(stage => stage.level === "float" && stage.pass !== "quantize").at(-1);
const floatNodes = new Map(stageNodes(floatStage).map(node => [node.name, node]));

const layers = joinLayers();
const layerNamed = new Map(layers.map(layer => [layer.node, layer]));

function joinLayers() {
  const rows = new Map();
  const row = entry => {
    if (!rows.has(entry.node)) rows.set(entry.node, {node: entry.node, module: entry.origin, effects: []});
    return rows.get(entry.node);
  };
  for (const product of report.products) row(product).product = product;
  for (const noise of report.noise) row(noise).noise = noise;
  for (const weight of report.weights) row(weight).weight = weight;
  for (const effect of report.effects) row(effect).effects.push(effect);
  for (const histogram of report.histograms) if (histogram.kind === "weight" && rows.has(histogram.node)) rows.get(histogram.node).weights = histogram;
  const codes = new Map(report.layers.map(tensor => [tensor.node, tensor]));
  const values = new Map(report.histograms.filter(h => h.kind === "activation").map(h => [h.node, h]));
  for (const layer of rows.values()) {
    const node = floatNodes.get(layer.node);
    if (!node) continue;
    layer.label = node.label;
    layer.shape = node.shape;
    for (const [key, tensor] of [["input", tensorAbove(node, codes)], ["output", tensorBelow(layer.node, codes)]])
      layer[key] = tensor && {...codes.get(tensor), histogram: values.get(tensor)};
  }
  return [...rows.values()].filter(layer => layer.product || layer.noise || layer.weight).map((layer, position) => ({...layer, position: position + 1}));
}

/** The codes that a layer reads: its first operand, or what that was computed from without a layer. */
function tensorAbove(node, codes) {
  for (let name = node.inputs[0], steps = 0; name && steps < 50; steps++) {
    if (codes.has(name)) return name;
    name = floatNodes.get(name)?.inputs[0];
  }
}

/** The first codes behind a layer. */
function tensorBelow(layer, codes) {
  return [...floatNodes.values()].find(node => node.layer === layer && codes.has(node.name))?.name;
}

/** Mean over the graph outputs. */
const mean = values => (values?.length ? values.map(number).reduce((a, b) => a + b, 0) / values.length : null);
