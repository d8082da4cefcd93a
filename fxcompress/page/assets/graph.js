// The graph before and after a pass: laid out by dagre in a worker, drawn on canvas.

const BOX = {width: 244, height: 40};
const KINDS = {weights: ["#2457c5", "weights"], rounding: ["#8a63b8", "rounding"], sum: ["#c98a1b", "sums"], activation: ["#1c8a57", "activations"], pooling: ["#1d8f9d", "pooling"],
  normalization: ["#b4487f", "normalization"], movement: ["#8b95a5", "movement"], boundary: ["#39424f", "inputs, outputs"], other: ["#8b95a5", "other"]};
const MARKS = {added: ["#1c8a57", "#e9f7ef", "added"], removed: ["#c23b4e", "#fdeef0", "removed"], changed: ["#c98a1b", "#fff7e6", "changed"]};

/** Positions of a stage's nodes: {nodes: [{x, y, ...node}], edges: [[{x, y}, ...]], width, height}. Computed once, in a worker. */
const layouts = new Map();
function layoutOf(index) {
  if (!layouts.has(index)) layouts.set(index, compute(stageNodes(graphs.stages[index])));
  return layouts.get(index);
}

/**
 * Runs in the worker. Networks are mostly chains of blocks, so the graph is cut at the nodes that everything passes through, every block
 * is laid out on its own, and equal blocks only once: dagre's time grows faster than the graph, this one's does not.
 */
function layoutScript() {
  const known = new Map();

  /** Positions and edges of one block: nodes 0..size-1, edges [from, to]. */
  function block(size, edges, box) {
    const key = `${size}:${edges.join(";")}`;
    if (!known.has(key)) {
      const graph = new dagre.graphlib.Graph();
      graph.setGraph({rankdir: "TB", nodesep: 22, ranksep: 24, ranker: size > 200 ? "tight-tree" : "network-simplex"});
      graph.setDefaultEdgeLabel(() => ({}));
      for (let i = 0; i < size; i++) graph.setNode(String(i), {...box});
      for (const [from, to] of edges) graph.setEdge(String(from), String(to));
      dagre.layout(graph);
      const positions = Array.from({length: size}, (_, i) => [graph.node(String(i)).x, graph.node(String(i)).y]);
      known.set(key, {positions, lines: edges.map(([from, to]) => graph.edge(String(from), String(to)).points.map(p => [p.x, p.y]))});
    }
    return known.get(key);
  }

  /** Where no edge leads from before a node to behind it. */
  function cuts(size, edges) {
    const last = new Array(size).fill(0), found = [0];
    for (const [from, to] of edges) last[from] = Math.max(last[from], to);
    for (let i = 1, reach = last[0]; i < size; reach = Math.max(reach, last[i++])) if (reach <= i) found.push(i);
    if (found.at(-1) !== size - 1) found.push(size - 1);
    return found;
  }

  self.onmessage = ({data: {size, edges, box}}) => {
    const positions = [], lines = [], ends = [], bounds = cuts(size, edges);
    let right = -Infinity, left = Infinity, bottom = 0;
    const place = (first, count, inside) => {
      const {positions: local, lines: paths} = block(count, inside, box);
      const [x, y] = positions[first] ?? [0, box.height / 2];
      const shift = ([u, v]) => [u + x - local[0][0], v + y - local[0][1]];
      local.forEach((point, i) => (positions[first + i] = shift(point)));
      paths.forEach((path, i) => lines.push(path.map(shift)) && ends.push([first + inside[i][0], first + inside[i][1]]));
    };
    let next = 0;
    const sorted = [...edges].sort((a, b) => a[0] - b[0]);
    for (let k = 0; k + 1 < bounds.length; k++) {
      const inside = [];
      for (; next < sorted.length && sorted[next][0] < bounds[k + 1]; next++) inside.push(sorted[next].map(i => i - bounds[k]));
      place(bounds[k], bounds[k + 1] - bounds[k] + 1, inside);
    }
    if (size === 1) place(0, 1, []);
    for (const [x, y] of [...positions, ...lines.flat()]) [left, right, bottom] = [Math.min(left, x), Math.max(right, x), Math.max(bottom, y)];
    const margin = left - box.width / 2;
    const moved = ([x, y]) => [x - margin, y];
    self.postMessage({positions: positions.map(moved), lines: lines.map(line => line.map(moved)), ends, width: right - left + box.width, height: bottom + box.height / 2});
  };
}

function compute(nodes) {
  const position = new Map(nodes.map((node, i) => [node.name, i]));
  const edges = nodes.flatMap((node, i) => [...new Set(node.inputs)].map(input => [position.get(input), i]));
  const source = URL.createObjectURL(new Blob([byId("layout").textContent, `(${layoutScript})();`], {type: "text/javascript"}));
  return new Promise((resolve, reject) => {
    const worker = new Worker(source);
    worker.onerror = event => reject(new Error(`layout: ${event.message}`));
    worker.onmessage = ({data}) => {
      worker.terminate();
      URL.revokeObjectURL(source);
      const placed = nodes.map((node, i) => ({...node, x: data.positions[i][0] - BOX.width / 2, y: data.positions[i][1] - BOX.height / 2}));
      const lines = data.lines.map((points, i) => ({points, ends: data.ends[i].map(end => nodes[end].name), top: Math.min(...points.map(p => p[1])), bottom: Math.max(...points.map(p => p[1]))}));
      resolve({nodes: placed, edges: lines, width: data.width, height: data.height});
    };
    worker.postMessage({size: nodes.length, edges, box: BOX});
  });
}

class GraphView {
  constructor(container, onchoose) {
    this.container = container;
    this.onchoose = onchoose;
    this.canvas = element("canvas", {tabindex: "0", "aria-label": "graph"});
    this.waiting = element("div", {class: "wait"}, "laying out…");
    const button = (text, title, action, name) => element("button", {title, "aria-label": title, class: name, onclick: action}, text);
    container.append(this.canvas, this.waiting, element("div", {class: "zoom"}, button("+", "zoom in", () => this.zoom(1.4)), button("−", "zoom out", () => this.zoom(1 / 1.4)),
      button("fit width", "fit the width", () => this.fit(), "text"), button("whole", "show the whole graph", () => this.whole(), "text")));
    this.view = {k: 1, x: 0, y: 0};
    this.marks = new Map();
    this.refused = new Map();
    this.listen();
    new ResizeObserver(() => this.draw()).observe(container);
  }

  async show(index, marks, refused) {
    this.waiting.hidden = false;
    this.graph = null;
    this.draw();
    const graph = await layoutOf(index);
    this.waiting.hidden = true;
    Object.assign(this, {graph, marks, refused, chosen: null});
    this.byName = new Map(graph.nodes.map(node => [node.name, node]));
    this.fit();
    this.draw();
  }

  get size() {
    return {width: this.container.clientWidth, height: this.container.clientHeight};
  }

  fit() {
    if (!this.graph) return;
    const {width} = this.size;
    const k = Math.min(1, Math.max(0.45, (width - 64) / this.graph.width));
    this.view = {k, x: (width - 40 - this.graph.width * k) / 2, y: 16};
    if (this.graph.width * k > width - 64) {
      const first = this.graph.nodes[0];
      this.view.x = width / 2 - (first.x + BOX.width / 2) * k;
    }
    this.draw();
  }

  whole() {
    if (!this.graph) return;
    const {width, height} = this.size;
    const k = Math.min(1, (width - 60) / this.graph.width, (height - 24) / this.graph.height);
    this.view = {k, x: (width - 40 - this.graph.width * k) / 2, y: 12};
    this.draw();
  }

  /** Bring a node into the middle. */
  center(name) {
    const node = this.byName?.get(name);
    if (!node) return false;
    const {width, height} = this.size;
    if (this.view.k < 0.5) this.view.k = 0.8;
    this.view.x = (width - 30) / 2 - (node.x + BOX.width / 2) * this.view.k;
    this.view.y = height / 2 - (node.y + BOX.height / 2) * this.view.k;
    this.keepInside();
    this.chosen = name;
    this.draw();
    return true;
  }

  zoom(factor, x = this.size.width / 2, y = this.size.height / 2) {
    const k = Math.min(2.5, Math.max(0.01, this.view.k * factor));
    this.view = {k, x: x - (x - this.view.x) * (k / this.view.k), y: y - (y - this.view.y) * (k / this.view.k)};
    this.draw();
  }

  listen() {
    const at = event => {
      const box = this.canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    this.canvas.addEventListener("wheel", event => {
      event.preventDefault();
      if (event.ctrlKey || event.metaKey) return this.zoom(Math.exp(-event.deltaY / 300), ...at(event));
      this.view.x -= event.shiftKey ? event.deltaY : event.deltaX;
      this.view.y -= event.shiftKey ? 0 : event.deltaY;
      this.keepInside();
      this.draw();
    }, {passive: false});
    let drag = null;
    this.canvas.addEventListener("pointerdown", event => {
      const [x, y] = at(event);
      drag = {x, y, moved: false, strip: x > this.size.width - STRIP};
      this.canvas.setPointerCapture(event.pointerId);
      if (drag.strip) this.jump(y);
    });
    this.canvas.addEventListener("pointermove", event => {
      const [x, y] = at(event);
      if (!drag) return this.hover(event, x, y);
      if (drag.strip) return this.jump(y);
      drag.moved ||= Math.abs(x - drag.x) + Math.abs(y - drag.y) > 3;
      this.view.x += x - drag.x;
      this.view.y += y - drag.y;
      Object.assign(drag, {x, y});
      this.draw();
    });
    this.canvas.addEventListener("pointerup", event => {
      const [x, y] = at(event);
      const node = drag && !drag.moved && !drag.strip && this.nodeAt(x, y);
      drag = null;
      if (node) this.onchoose(node);
    });
    this.canvas.addEventListener("pointerleave", () => tooltip.hide());
    this.canvas.addEventListener("keydown", event => {
      const step = {ArrowDown: [0, -60], ArrowUp: [0, 60], ArrowLeft: [60, 0], ArrowRight: [-60, 0], PageDown: [0, -500], PageUp: [0, 500]}[event.key];
      if (event.key === "+" || event.key === "-") this.zoom(event.key === "+" ? 1.25 : 0.8);
      if (!step) return;
      event.preventDefault();
      this.view.x += step[0];
      this.view.y += step[1];
      this.keepInside();
      this.draw();
    });
  }

  /** No empty space above or below a graph that is taller than the view; some of it stays in sight sideways. */
  keepInside() {
    if (!this.graph) return;
    const {width, height} = this.size, {k} = this.view, margin = 16, tall = this.graph.height * k;
    this.view.y = tall + 2 * margin > height ? Math.min(margin, Math.max(height - margin - tall, this.view.y)) : Math.min(height - 60, Math.max(margin, this.view.y));
    this.view.x = Math.min(width - 100, Math.max(60 - this.graph.width * k, this.view.x));
  }

  jump(y) {
    if (!this.graph) return;
    this.view.y = this.size.height / 2 - (y / this.size.height) * this.graph.height * this.view.k;
    this.keepInside();
    this.draw();
  }

  nodeAt(x, y) {
    const gx = (x - this.view.x) / this.view.k, gy = (y - this.view.y) / this.view.k;
    return this.graph?.nodes.find(node => gx >= node.x && gx <= node.x + BOX.width && gy >= node.y && gy <= node.y + BOX.height);
  }

  hover(event, x, y) {
    const node = x < this.size.width - STRIP && this.nodeAt(x, y);
    this.canvas.style.cursor = node ? "pointer" : "";
    if (!node) return tooltip.hide();
    const mark = this.marks.get(node.name), refused = this.refused.get(node.name);
    tooltip.show(event, bold(`${node.label}  ${node.name}`), node.text, ...(mark ? [`${mark} by the pass`] : []), ...(refused ? [element("div", {class: "bad"}, `refused: ${refused}`)] : []));
  }

  draw() {
    if (this.pending) return;
    this.pending = requestAnimationFrame(() => {
      this.pending = null;
      this.paint();
    });
  }

  paint() {
    const {width, height} = this.size, ratio = devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
    }
    const pen = this.canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    if (!this.graph) return;
    const {k, x, y} = this.view;
    const top = -y / k, bottom = (height - y) / k;
    pen.setTransform(ratio * k, 0, 0, ratio * k, ratio * x, ratio * y);
    this.paintEdges(pen, top, bottom, k);
    for (const node of this.graph.nodes) if (node.y < bottom && node.y + BOX.height > top) this.paintNode(pen, node, k);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.paintStrip(pen, width, height);
  }

  paintEdges(pen, top, bottom, k) {
    pen.lineWidth = Math.max(1.2, 0.7 / k);
    for (const edge of this.graph.edges) {
      if (edge.top > bottom || edge.bottom < top) continue;
      const near = this.chosen && edge.ends.includes(this.chosen);
      pen.strokeStyle = near ? "#2457c5" : "#bcc5d1";
      const points = edge.points;
      pen.beginPath();
      pen.moveTo(...points[0]);
      for (let i = 1; i < points.length - 1; i++) pen.quadraticCurveTo(...points[i], (points[i][0] + points[i + 1][0]) / 2, (points[i][1] + points[i + 1][1]) / 2);
      pen.lineTo(...points.at(-1));
      pen.stroke();
      if (k < 0.35) continue;
      const [ex, ey] = points.at(-1);
      pen.fillStyle = pen.strokeStyle;
      pen.beginPath();
      pen.moveTo(ex, ey);
      pen.lineTo(ex - 4, ey - 7);
      pen.lineTo(ex + 4, ey - 7);
      pen.fill();
    }
  }

  paintNode(pen, node, k) {
    const mark = MARKS[this.marks.get(node.name)], color = KINDS[node.kind][0], chosen = node.name === this.chosen;
    pen.fillStyle = mark ? mark[1] : "#fff";
    pen.strokeStyle = chosen ? "#2457c5" : mark ? mark[0] : "#cdd4de";
    pen.lineWidth = (chosen ? 2.6 : mark ? 1.6 : 1) * Math.max(1, 0.5 / k);
    pen.beginPath();
    pen.roundRect(node.x, node.y, BOX.width, BOX.height, 7);
    pen.fill();
    pen.stroke();
    pen.fillStyle = k < 0.35 && mark ? mark[0] : color;
    pen.beginPath();
    pen.roundRect(node.x, node.y, k < 0.35 ? BOX.width : 5, BOX.height, k < 0.35 ? 7 : [7, 0, 0, 7]);
    pen.globalAlpha = k < 0.35 ? 0.55 : 1;
    pen.fill();
    pen.globalAlpha = 1;
    if (this.refused.has(node.name)) {
      pen.strokeStyle = "#c23b4e";
      pen.setLineDash([5, 3]);
      pen.lineWidth = 1.6 * Math.max(1, 0.5 / k);
      pen.beginPath();
      pen.roundRect(node.x - 4, node.y - 4, BOX.width + 8, BOX.height + 8, 10);
      pen.stroke();
      pen.setLineDash([]);
    }
    if (k < 0.35) return;
    const shapeText = sampleShape(node.shape);
    pen.font = "600 12.5px system-ui, 'DejaVu Sans', sans-serif";
    pen.fillStyle = "#1b2330";
    pen.fillText(clip(pen, node.label, BOX.width - 24), node.x + 14, node.y + 17);
    pen.font = "11px system-ui, 'DejaVu Sans', sans-serif";
    pen.fillStyle = "#5f6b7c";
    const right = pen.measureText(shapeText).width;
    pen.fillText(shapeText, node.x + BOX.width - 9 - right, node.y + 32);
    pen.fillText(clip(pen, node.module || node.name, BOX.width - 34 - right), node.x + 14, node.y + 32);
  }

  paintStrip(pen, width, height) {
    const left = width - STRIP, scale = height / this.graph.height, across = (STRIP - 10) / this.graph.width;
    pen.fillStyle = "rgb(246 247 249 / 94%)";
    pen.fillRect(left, 0, STRIP, height);
    for (const node of this.graph.nodes) {
      const mark = MARKS[this.marks.get(node.name)];
      pen.fillStyle = mark ? mark[0] : "#c5ccd6";
      pen.fillRect(left + 5 + node.x * across, node.y * scale, Math.max(3, BOX.width * across), Math.max(1, BOX.height * scale));
      if (this.refused.has(node.name)) {
        pen.fillStyle = "#c23b4e";
        pen.fillRect(left, node.y * scale - 1, 4, 3);
      }
    }
    const {k, y} = this.view;
    pen.strokeStyle = "#2457c5";
    pen.fillStyle = "rgb(36 87 197 / 9%)";
    const top = Math.max(0, (-y / k) * scale), tall = Math.min(height, (height / k) * scale);
    pen.lineWidth = 1.2;
    pen.fillRect(left + 1, top, STRIP - 2, tall);
    pen.strokeRect(left + 1, top + 0.5, STRIP - 2, tall - 1);
  }
}
const STRIP = 34;

/** "f32[N, 16, 8, 8]" as "f32 16×8×8": what one sample is. */
function sampleShape(text) {
  const [type, sizes] = text.replace("]", "").split("[");
  return sizes === undefined ? text : `${type} ${sizes.split(", ").filter((size, i) => i || size !== "N").join("×")}`.trim();
}

function clip(pen, text, width) {
  if (pen.measureText(text).width <= width) return text;
  while (text.length > 1 && pen.measureText(`…${text}`).width > width) text = text.slice(1);
  return `…${text}`;
}

/** What differs between two stages, by name. */
function difference(before, after) {
  const old = new Map(before.map(node => [node.name, node.text])), marks = {before: new Map(), after: new Map()};
  for (const node of after) {
    if (!old.has(node.name)) marks.after.set(node.name, "added");
    else if (old.get(node.name) !== node.text) for (const side of ["before", "after"]) marks[side].set(node.name, "changed");
    old.delete(node.name);
  }
  for (const name of old.keys()) marks.before.set(name, "removed");
  return marks;
}
