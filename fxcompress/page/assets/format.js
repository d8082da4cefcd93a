// Numbers as text, elements, the tooltip.

const NONE = "–";
const number = value => (value === "inf" ? Infinity : value === "-inf" ? -Infinity : value === "nan" ? NaN : value);
const known = value => value !== null && value !== undefined && !Number.isNaN(number(value));
const decibels = value => (!known(value) ? NONE : Number.isFinite(number(value)) ? number(value).toFixed(1) : "exact");
const count = value => (known(value) ? Math.round(value).toLocaleString("en-US") : NONE);
const percent = value => (known(value) ? (value ? (100 * value).toFixed(value < 0.01 ? 2 : 1) : "0") + " %" : NONE);
const significant = value => (known(value) ? String(Number(number(value).toPrecision(4))) : NONE);

function scaled(value, units, step) {
  if (!known(value)) return NONE;
  let i = 0;
  for (; i < units.length - 1 && Math.abs(value) >= step; i++) value /= step;
  return `${i && value < 100 ? value.toPrecision(3) : Math.round(value)} ${units[i]}`.trim();
}
const bytes = value => scaled(value, ["B", "KB", "MB", "GB"], 1000);
const short = value => scaled(value, ["", "K", "M", "G"], 1000);
const time = nanoseconds => scaled(nanoseconds, ["ns", "µs", "ms", "s"], 1000);
const seconds = value => (!known(value) ? NONE : value < 0.0005 ? "0" : value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`);

const byId = id => document.getElementById(id);

/** element("td", {class: "n", onclick: f}, "text", child, ...) */
function element(tag, attributes = {}, ...children) {
  return build(document.createElement(tag), attributes, children);
}
function shape(tag, attributes = {}, ...children) {
  return build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}
function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter(child => child !== null && child !== undefined));
  return node;
}

const tooltip = {
  show(event, ...lines) {
    const box = byId("tooltip");
    box.replaceChildren(...lines.map(line => (typeof line === "string" ? element("div", {class: "muted"}, line) : line)));
    box.classList.add("on");
    const {width, height} = box.getBoundingClientRect();
    const x = event.clientX + 16 + width > innerWidth ? event.clientX - width - 12 : event.clientX + 16;
    const y = event.clientY + 16 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 16;
    box.style.left = `${Math.max(4, x)}px`;
    box.style.top = `${Math.max(4, y)}px`;
  },
  hide: () => byId("tooltip").classList.remove("on"),
};
const bold = text => element("div", {}, element("b", {}, text));

const LEVELS = {float: "var(--float)", qdq: "var(--qdq)", integer: "var(--integer)"};
