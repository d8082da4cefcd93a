// Puts the sections together: which pass is shown, which node, which layer.

const WHOLE = "";  // the choice "captured network → integer network"
const changing = report.passes.map(pass => pass.name).filter(name => graphs.stages.some(stage => stage.pass === name));
const shown = {pass: WHOLE};
const views = {};

function choosePass(name, scroll) {
  shown.pass = name;
  byId("pass").value = name;
  document.querySelectorAll("#passes tr[data-pass]").forEach(row => row.classList.toggle("chosen", row.dataset.pass === name));
  if (scroll) byId("graph").scrollIntoView();
  return drawGraph();
}

/** [before, after] positions of the stages around a pass. */
function stagesAround(name) {
  if (name === WHOLE) return [0, graphs.stages.length - 1];
  const order = report.passes.map(pass => pass.name), position = order.indexOf(name);
  const behind = stage => (stage.pass === "captured" ? -1 : order.indexOf(stage.pass));
  const last = limit => graphs.stages.findLastIndex(stage => behind(stage) <= limit);
  return [last(position - 1), last(position)];
}

async function drawGraph() {
  const [before, after] = stagesAround(shown.pass), pass = passNamed(shown.pass);
  const sides = [stageNodes(graphs.stages[before]), stageNodes(graphs.stages[after])];
  const marks = shown.pass === WHOLE ? {before: new Map(), after: new Map()} : difference(...sides);
  const refusals = pass ? [pass] : report.passes;
  const refused = new Map(refusals.flatMap(p => p.refusal_nodes.map((node, i) => [node, reason(p.refusals[i])])));
  const title = (id, stage, nodes, word) => byId(id).replaceChildren(`${word}: `, element("b", {}, stage.pass === "captured" ? "the captured network" : `behind ${stage.pass}`), `, ${nodes.length} nodes`);
  title("before-title", graphs.stages[before], sides[0], "before");
  title("after-title", graphs.stages[after], sides[1], "after");
  const counts = Object.keys(MARKS).map(mark => [mark, new Set([...marks.before, ...marks.after].filter(([, m]) => m === mark).map(([name]) => name)).size]);
  byId("change-count").textContent = shown.pass === WHOLE ? "" : before === after ? "the graph is the same" : counts.filter(([, n]) => n).map(([mark, n]) => `${count(n)} ${mark}`).join(", ");
  drawLists(pass, refusals);
  await Promise.all([views.before.show(before, marks.before, refused), views.after.show(after, marks.after, refused)]);
  const first = [...marks.after.keys()][0] ?? [...marks.before.keys()][0];
  if (first && sides[1].length > 60) centerNode(first, false);
}

const reason = text => text.split(" because ").slice(1).join(" because ") || text;
const summaryOf = text => text.split(": ").slice(1).join(": ") || text;

function drawLists(pass, refusals) {
  const fill = (id, entries, nothing) => byId(id).replaceChildren(...(entries.length ? entries.map(([node, head, text]) => element("li", {onclick: () => centerNode(node, true)}, element("b", {}, head), ` ${text}`)) : [element("li", {class: "empty"}, nothing)]));
  const where = node => floatNodes.get(node)?.module || node;
  byId("did-title").textContent = pass ? `What ${pass.name} did (${count(pass.matches.length)})` : "What the passes did";
  fill("did", pass ? pass.match_nodes.map((node, i) => [node, where(node), summaryOf(pass.matches[i])]) : report.passes.filter(p => p.rewrites).map(p => [p.match_nodes[0], p.name, `${count(p.rewrites)} rewrites`]), "nothing");
  const places = refusals.flatMap(p => p.refusal_nodes.map((node, i) => [node, pass ? where(node) : `${p.name} at ${where(node)}`, reason(p.refusals[i])]));
  byId("refused-title").textContent = `Refused (${count(places.length)})`;
  fill("refused", places, "nothing was refused");
}

/** Show a node, or the layer it belonged to where it is no more, in both graphs. */
function centerNode(name, choose) {
  const layer = floatNodes.get(name)?.layer ?? graphs.nodes.find(node => node.name === name)?.layer;
  for (const view of Object.values(views)) {
    if (!view.center(name) && layer) view.center(layer);
    if (!choose) view.chosen = null;
  }
}

function chooseNode(node) {
  centerNode(node.name, true);
  if (layerNamed.has(node.layer)) chooseLayer(node.layer, false);
}

function drawToolbar() {
  const option = (value, text) => element("option", {value}, text);
  byId("pass").append(option(WHOLE, "captured network → integer network"), ...report.passes.map((pass, i) => option(pass.name, `${i + 1}  ${pass.name}${changing.includes(pass.name) ? "" : "  (unchanged)"}`)));
  byId("pass").addEventListener("change", event => choosePass(event.target.value));
  const choices = [WHOLE, ...changing];
  const move = step => {
    const order = report.passes.map(pass => pass.name), here = order.indexOf(shown.pass);
    const candidates = step > 0 ? changing.filter(name => order.indexOf(name) > here) : changing.filter(name => order.indexOf(name) < here).reverse();
    choosePass(candidates[0] ?? (step > 0 ? choices.at(-1) : WHOLE));
  };
  byId("previous").addEventListener("click", () => move(-1));
  byId("next").addEventListener("click", () => move(1));
  byId("find").addEventListener("input", event => {
    const text = event.target.value.toLowerCase();
    const nodes = views.after.graph?.nodes ?? [];
    const found = text && (nodes.find(node => node.name === text || node.module.toLowerCase() === text) ?? nodes.find(node => `${node.name} ${node.module} ${node.label}`.toLowerCase().includes(text)));
    if (found) centerNode(found.name, true);
  });
  const used = new Set(graphs.nodes.map(node => node.kind));
  byId("graph-legend").append(...Object.entries(KINDS).filter(([kind]) => used.has(kind) && kind !== "other").map(([, [color, text]]) => element("span", {class: "key"}, element("i", {style: `background: ${color}`}), text)),
    element("span", {style: "margin-left: 14px"}, "the pass:"), ...Object.values(MARKS).map(([color, fill, text]) => element("span", {class: "key"}, element("i", {style: `background: ${fill}; border: 1.5px solid ${color}`}), text)),
    element("span", {class: "key"}, element("i", {style: "border: 1.5px dashed #c23b4e"}), "refused"));
}

drawSummary();
drawAccuracy();
drawPipeline();
drawLayers();
drawToolbar();
for (const side of ["before", "after"]) views[side] = new GraphView(byId(side), chooseNode);
const ready = choosePass(WHOLE);
window.fxcompress = {report, graphs, layers, views, ready, choosePass, chooseLayer};
