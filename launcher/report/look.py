"""The report's style sheet and its one script: the read-out under the pointer."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfbf8; --ink: #1f2125; --soft: #6a6d73; --hair: #dfdbd2; --grid: #ece8e0;
  --good: #23724a; --bad: #a8421f; --card: #ffffff;
  --s0: #2560a8; --s1: #c2571a; --s2: #2b8257; --s3: #8a4fa3; --s4: #b08a14; --s5: #b03a5b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171b; --ink: #e4e2dc; --soft: #989ba1; --hair: #34373d; --grid: #26292e;
    --good: #72c597; --bad: #ec9270; --card: #1f2227;
    --s0: #79aef0; --s1: #f0965a; --s2: #6cc596; --s3: #c795df; --s4: #dcbb55; --s5: #ee8ba6;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 ui-sans-serif, system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: break-word;
}
main { max-width: 1080px; margin: 0 auto; padding: clamp(28px, 6vw, 72px) clamp(18px, 4vw, 40px); }
h1, h2, .tile strong {
  font-family: ui-serif, Charter, "Iowan Old Style", "Source Serif 4", Georgia, serif; font-weight: 500;
}
h1 { font-size: clamp(28px, 5vw, 42px); line-height: 1.15; letter-spacing: -.012em; margin: 6px 0 10px; }
h2 { font-size: 23px; margin: 68px 0 4px; }
h3 { font-size: 14px; font-weight: 600; margin: 0; }
p { margin: 0; max-width: 72ch; }
.soft, figcaption p, caption, .tile span, .tile small { color: var(--soft); }
.state { font-size: 12.5px; font-weight: 600; letter-spacing: .07em; text-transform: uppercase; }
.finished { color: var(--good); } .unfinished, .bad { color: var(--bad); } .good { color: var(--good); }
.tiles {
  display: grid; grid-template-columns: repeat(6, auto); justify-content: space-between; gap: 26px 24px;
  margin: 40px 0 18px; padding: 24px 0; border: solid var(--hair); border-width: 1px 0;
}
.tile > * { display: block; }
.tile span { font-size: 13px; }
.tile strong { font-size: 27px; line-height: 1.3; white-space: nowrap; }
.tile small { font-size: 12.5px; line-height: 1.4; }
.fine { font-size: 13px; }
.pair, .charts { display: grid; gap: 12px 56px; }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr)); gap: 0 40px; }
.chart { margin: 26px 0 0; min-width: 0; }
.pair .chart { margin-top: 20px; }
.pair .plot { height: 220px; }
@media (max-width: 960px) { .tiles { grid-template-columns: repeat(3, 1fr); } }
@media (max-width: 520px) { .tiles { grid-template-columns: repeat(2, 1fr); } }
.chart.wide { grid-column: 1 / -1; }
figcaption p { font-size: 13px; }
figcaption ul { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 4px 0 0; padding: 0; list-style: none;
  font-size: 13px; }
.key::before { content: ""; display: inline-block; width: 16px; height: 0; margin-right: 8px;
  border-top: 2.5px solid var(--c); vertical-align: 4px; }
.key.dashed::before { border-top-style: dashed; }
.plot { position: relative; height: 172px; margin: 20px 14px 34px 46px; }
.plot { cursor: crosshair; touch-action: pan-y; }
.wide .plot { height: 300px; }
svg { display: block; width: 100%; height: 100%; overflow: visible; pointer-events: none; }
svg path { fill: none; vector-effect: non-scaling-stroke; stroke-linecap: round; stroke-linejoin: round; }
.grid { stroke: var(--grid); stroke-width: 1; }
.line { stroke: var(--c); stroke-width: 1.9; }
.line.dashed { stroke-dasharray: 7 5; }
.raw { stroke-width: 1; opacity: .5; }
.dots { stroke: var(--c); stroke-width: 6; }
.mark { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 4; }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); }
.s3 { --c: var(--s3); } .s4 { --c: var(--s4); } .s5 { --c: var(--s5); }
.x, .y, .m { position: absolute; font-size: 12px; line-height: 1; color: var(--soft); white-space: nowrap;
  pointer-events: none; }
.x { top: calc(100% + 10px); transform: translateX(-50%); } .x.first { left: 0; transform: none; }
.y { right: calc(100% + 10px); transform: translateY(50%); }
.m { top: -2px; padding: 0 6px; } .m.before { transform: translateX(-100%); }
.hair, .tip { position: absolute; pointer-events: none; }
.hair { top: 0; bottom: 0; width: 1px; background: var(--soft); }
.tip { bottom: calc(100% + 8px); z-index: 1; padding: 7px 11px; background: var(--card);
  border: 1px solid var(--hair); border-radius: 5px; font-size: 12.5px; line-height: 1.5; white-space: pre;
  box-shadow: 0 3px 14px rgb(0 0 0 / .1); }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; margin: 20px 0 0; font-size: 14px; }
caption { text-align: left; font-size: 13px; padding-bottom: 8px; }
th, td { padding: 7px 20px 7px 0; text-align: left; vertical-align: top; }
th, td { border-bottom: 1px solid var(--grid); }
th:last-child, td:last-child { padding-right: 0; }
thead th { font-size: 12.5px; color: var(--soft); border-color: var(--hair); white-space: nowrap; }
th { font-weight: 500; }
.n { text-align: right; white-space: nowrap; }
.t { white-space: nowrap; }
td.d { min-width: 220px; overflow-wrap: anywhere; color: var(--soft); font-size: 13px; }
details { margin: 22px 0 0; }
summary { cursor: pointer; color: var(--soft); font-size: 14px; }
summary:hover { color: var(--ink); }
pre { margin: 14px 0 0; padding: 18px 20px; overflow-x: auto; background: var(--card);
  border: 1px solid var(--hair); border-radius: 5px;
  font: 12.5px/1.6 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
dl { margin: 14px 0 0; font-size: 14px; }
dt { font-weight: 600; }
dd { margin: 0 0 10px; color: var(--soft); }
@media print { details:not([open]) { display: none; } figure, tr { break-inside: avoid; } }
"""

# The drawn paths are the data: positions are turned back into values, so nothing is written twice.
SCRIPT = """
const format = value => value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(2)
  : new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 4}).format(value);
const value = (axis, share, log) => log ? axis[0] * (axis[1] / axis[0]) ** share
  : axis[0] + share * (axis[1] - axis[0]);
for (const plot of document.querySelectorAll(".plot")) {
  const [across, up] = [plot.dataset.x, plot.dataset.y].map(axis => axis.split(" ").map(Number));
  const lines = [...plot.querySelectorAll("path[data-name]")].map(path => ({
    name: path.dataset.name,
    points: (path.getAttribute("d").match(/[^ M]+ [^ M]+/g) || []).map(pair => pair.split(" ").map(Number)),
  }));
  const hair = document.createElement("div"), tip = document.createElement("div");
  hair.className = "hair"; tip.className = "tip";
  const leave = () => { hair.remove(); tip.remove(); };
  const read = event => {
    const box = plot.getBoundingClientRect(), at = 1000 * (event.clientX - box.left) / box.width;
    const found = lines.filter(line => line.points.length).map(line => ({name: line.name,
      point: line.points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)}));
    const x = found[0].point[0];
    tip.textContent = [format(value(across, x / 1000)) + " tokens", ...found.map(({name, point}) =>
      name + "  " + format(value(up, 1 - point[1] / 1000, "log" in plot.dataset)))].join("\\n");
    hair.style.left = x / 10 + "%";
    tip.style.left = x < 500 ? x / 10 + "%" : "auto";
    tip.style.right = x < 500 ? "auto" : 100 - x / 10 + "%";
    plot.append(hair, tip);
  };
  plot.addEventListener("pointermove", read);
  plot.addEventListener("pointerdown", read);
  plot.addEventListener("pointerleave", leave);
}
"""
