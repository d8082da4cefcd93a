// The passes in order: time, what they changed, what they refused, and what they are worth.

function drawPipeline() {
  const laps = Object.entries(report.seconds).filter(([name]) => name !== "total");
  const colors = {capture: "#7d8aa0", passes: "var(--accent)", verify: "var(--integer)", "measuring passes": "#b9a3d6"};
  const color = name => colors[name] ?? "#999";
  byId("stages-legend").append(...laps.map(([name, spent]) => element("span", {class: "key"}, element("i", {style: `background: ${color(name)}`}), `${name} ${seconds(spent)}`)));
  byId("stages").append(...laps.map(([name, spent]) => element("div", {style: `flex: ${Math.max(spent, 0.001)}; background: ${color(name)}`, title: `${name} ${seconds(spent)}`})));
  const rewrites = report.passes.reduce((sum, pass) => sum + pass.rewrites, 0), refused = report.passes.reduce((sum, pass) => sum + pass.refusals.length, 0);
  byId("pipeline-lead").textContent = `${report.passes.length} passes made ${count(rewrites)} rewrites and declined ${count(refused)} places. “Behind it” is the SQNR of the output at that point; ` +
    "“without it” what the rounded network would reach if the pass were left out. Click a pass to see what it did.";
  const slowest = Math.max(...report.passes.map(pass => pass.seconds + pass.check_seconds), 1e-9);
  const head = element("tr", {}, ...["", "pass", "level", "effect"].map(text => element("th", {}, text)),
    ...["rewrites", "refused"].map(text => element("th", {class: "n"}, text)), element("th", {}, "time (light: checks)"), element("th", {class: "n"}, ""),
    ...["behind it dB", "without it dB", "worth"].map(text => element("th", {class: "n"}, text)));
  byId("passes").append(element("thead", {}, head), element("tbody", {}, ...report.passes.map((pass, i) => passRow(pass, i, slowest))));
}

function passRow(pass, i, slowest) {
  const bar = element("span", {class: "time"}, element("i", {style: `width: ${100 * pass.seconds / slowest}%; background: ${LEVELS[pass.level]}`}),
    element("i", {style: `width: ${100 * pass.check_seconds / slowest}%; background: ${LEVELS[pass.level]}; opacity: 0.35`}));
  const cell = (text, tooltipText) => element("td", {class: "n", title: tooltipText}, text);
  const alternative = pass.without && pass.without !== "left out" ? pass.without : null;
  return element("tr", {class: pass.rewrites || pass.refusals.length ? "row" : "row idle", "data-pass": pass.name, onclick: () => choosePass(pass.name, true)},
    element("td", {class: "n muted"}, String(i + 1)), element("td", {class: "name"}, pass.name),
    element("td", {style: `color: ${LEVELS[pass.level]}`}, pass.level), element("td", {}, element("span", {class: `tag ${pass.effect}`}, pass.effect)),
    cell(count(pass.rewrites)), cell(count(pass.refusals.length)), element("td", {}, bar), cell(seconds(pass.seconds + pass.check_seconds), `${seconds(pass.seconds)} and ${seconds(pass.check_seconds)} of checks`),
    cell(pass.output_sqnr ? pass.output_sqnr.map(decibels).slice(0, 3).join(", ") : ""), cell(pass.output_sqnr_without ? pass.output_sqnr_without.map(decibels).slice(0, 3).join(", ") : "", alternative), worth(pass));
}

/** The mean gain over the outputs. */
function worth(pass) {
  if (!pass.output_sqnr_without) return element("td", {class: "n"}, "");
  const gain = mean(pass.output_sqnr_with) - mean(pass.output_sqnr_without);
  if (!Number.isFinite(gain)) return element("td", {class: "n"}, NONE);
  return element("td", {class: `n ${gain > 0.05 ? "up" : gain < -0.05 ? "down" : ""}`, title: pass.without}, `${gain >= 0 ? "+" : "−"}${Math.abs(gain).toFixed(1)} dB`);
}
