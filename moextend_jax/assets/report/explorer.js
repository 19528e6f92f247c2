// Draws explorer.html: numbers of the block "data" in, Plotly's pictures out. explorer.py writes the data.
"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
// Paul Tol's "light" scheme, made for labelled cells and for the colour-blind, and vermilion for new experts.
const COLOURS = ["#77aadd", "#44bb99", "#eedd88", "#ffaabb", "#bbcc33", "#99ddff", "#aaaa00", "#dddddd"];
const NEW = "#d55e00";
const NUMBERED = 300; // cells up to which each has its number written in it

const get = (id) => document.getElementById(id);
const chosen = (id) => Number(get(id).value);
const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
// Plotly reads some HTML in texts, so texts from outside are escaped; elements of the page get theirs as textContent.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const percent = (part, whole) => (whole ? (100 * part) / whole : 0);
const options = (id, names) => get(id).replaceChildren(...names.map((name, n) => new Option(name, n)));

function draw(id, trace, { xaxis = {}, yaxis = {}, margin = {}, ...layout }) {
  const clear = "rgba(0,0,0,0)";
  const axis = { gridcolor: variable("line"), zeroline: false, fixedrange: true, automargin: true };
  Plotly.react(get(id), [trace], {
    paper_bgcolor: clear, plot_bgcolor: clear, dragmode: false,
    font: { color: variable("ink"), family: "system-ui, sans-serif", size: 12 },
    hoverlabel: { align: "left", bgcolor: variable("card"), bordercolor: variable("muted"), font: { color: variable("ink") } },
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, margin: { l: 48, r: 8, t: 30, b: 52, ...margin }, ...layout,
  }, { displayModeBar: false, responsive: true });
}

const heatmap = (z, hover, more) => ({
  type: "heatmap", z, customdata: hover, hovertemplate: "%{customdata}<extra></extra>", xgap: 1, ygap: 1, showscale: false, ...more,
});

function shares(id, z, hover, { x, y, xtitle, ytitle }) {
  const numbers = z.length * z[0].length <= NUMBERED;
  const text = z.map((row) => row.map((value) => (value === null ? "" : Math.round(value))));
  const colorscale = [[0, variable("ours") + "0c"], [1, variable("ours") + "99"]]; // so pale that the ink can be read on it
  const written = numbers ? { text, texttemplate: "%{text}", textfont: { color: variable("ink") } } : {};
  draw(id, heatmap(z, hover, { colorscale, zmin: 0, ...written }), {
    xaxis: { title: { text: xtitle }, ...x, tickangle: innerWidth < 600 ? -45 : 0, showgrid: false },
    yaxis: { title: { text: ytitle, standoff: 8 }, ...y, autorange: "reversed", showgrid: false },
    height: 80 + 26 * z.length, margin: { t: 8 },
  });
}

// Rows are of the layers that route; numbers for people are of all, of which the first few may be dense.
const layerAxis = (layers) => {
  const shown = [...Array(layers).keys()].filter((row) => row % (layers > 16 ? 4 : 1) === 0);
  return { tickvals: shown, ticktext: shown.map((row) => row + DATA.first) };
};
const nameAxis = (names) => (names.length > 16 ? {} : { tickvals: names.map((_, n) => n), ticktext: names.map(plain) });

// --- one example ---

function weights(example, model, layer, token) {
  const { picks, weights } = example.models[model];
  return picks[layer][token].map((expert, n) => [expert, weights[layer][token][n]]).filter(([expert]) => expert < example.names.length);
}

function lines(example, model, layer, token) {
  const of = weights(example, model, layer, token).map(([expert, weight]) => `expert ${plain(example.names[expert])}: ${weight} %`);
  return [`layer ${layer + DATA.first}`, ...of].join("<br>");
}

function drawExample() {
  const example = DATA.examples[chosen("example")], layer = chosen("layer");
  get("layer-name").textContent = layer + DATA.first + (DATA.extended.includes(layer) ? " (has new experts)" : "");
  get("question").textContent = example.question;
  const said = example.said.map(([model, answer]) => `${model}: ${answer}`);
  get("answers").textContent = [`right answer: ${example.answer}`, ...said].join(" · ");
  DATA.models.forEach(([model], n) => {
    if (!(model in example.models)) return;
    drawPicture(`picture-${n}`, example, model, layer);
    drawTokens(`tokens-${n}`, example, model, layer);
  });
}

function drawPicture(id, example, model, layer) {
  const asked = get("expert").value, { grid } = example, z = [], hover = [];
  for (let row = 0; row < grid; row++) {
    const patches = [...Array(grid).keys()].map((column) => row * grid + column);
    const tokens = patches.map((patch) => example.patches.indexOf(patch));
    const of = (token) => (token < 0 ? [] : weights(example, model, layer, token));
    const counts = ([expert]) => (asked === "new" ? expert >= DATA.base : expert === Number(asked));
    z.push(tokens.map((token) => of(token).filter(counts).reduce((sum, [, weight]) => sum + weight, 0)));
    hover.push(tokens.map((token, n) => `patch ${patches[n]}, ` + (token < 0 ? "" : lines(example, model, layer, token))));
  }
  const tint = { colorscale: [[0, "rgba(255,90,0,0)"], [1, "rgba(255,90,0,0.85)"]], zmin: 0, zmax: 100 };
  const image = { source: example.image, xref: "x", yref: "y", x: -0.5, y: -0.5, sizex: grid, sizey: grid, sizing: "stretch", layer: "below" };
  draw(id, heatmap(z, hover, tint), {
    images: [image], height: 280, margin: { l: 0, r: 0, t: 0, b: 0 },
    xaxis: { visible: false, range: [-0.5, grid - 0.5], constrain: "domain" },
    yaxis: { visible: false, range: [grid - 0.5, -0.5], constrain: "domain", scaleanchor: "x" },
  });
}

function drawTokens(id, example, model, layer) {
  const tokens = example.tokens.map((_, token) => token).filter((token) => example.patches[token] < 0);
  const layers = example.models[model].picks.map((_, layer) => layer);
  const first = layers.map((layer) => tokens.map((token) => weights(example, model, layer, token)[0][0]));
  const z = first.map((row) => row.map((expert) => (expert < DATA.base ? expert % COLOURS.length : COLOURS.length)));
  const text = first.map((row) => row.map((expert) => (expert < DATA.base ? expert : `n${expert - DATA.base}`)));
  const hover = layers.map((layer) => tokens.map((token) => `“${plain(example.tokens[token])}”, ` + lines(example, model, layer, token)));
  const colours = [...COLOURS, NEW], steps = colours.length;
  const colorscale = colours.flatMap((colour, n) => [[n / steps, colour], [(n + 1) / steps, colour]]);
  const y = { x0: -0.5, x1: tokens.length - 0.5, y0: layer - 0.5, y1: layer + 0.5 };
  get(id).style.minWidth = `${80 + 26 * tokens.length}px`;
  draw(id, heatmap(z, hover, { colorscale, zmin: -0.5, zmax: steps - 0.5, text, texttemplate: "%{text}", textfont: { color: "#111" } }), {
    title: { text: plain(DATA.models.find(([name]) => name === model)[1]), x: 0, font: { size: 14 } },
    xaxis: { tickvals: tokens.map((_, n) => n), ticktext: tokens.map((token) => plain(example.tokens[token])), tickangle: -90, showgrid: false },
    yaxis: { title: { text: "layer" }, autorange: "reversed", showgrid: false, ...layerAxis(layers.length) },
    shapes: [{ type: "rect", ...y, line: { color: variable("ink"), width: 2 } }], height: 140 + 24 * layers.length,
  });
}

// --- data sets, pairs of experts, layers ---

function drawLoads() {
  const { counts } = DATA.loads[chosen("load-data")];
  const totals = counts.map((row) => row.reduce((a, b) => a + b, 0));
  const z = counts.map((row, layer) => row.map((count, expert) => (DATA.has[layer][expert] ? percent(count, totals[layer]) : null)));
  const hover = z.map((row, layer) => row.map((share, expert) =>
    `layer ${layer + DATA.first}, expert ${plain(DATA.names[expert])}<br>${(share ?? 0).toFixed(1)} % of ${totals[layer].toLocaleString("en")} picks`));
  shares("loads", z, hover, { x: nameAxis(DATA.names), y: layerAxis(z.length), xtitle: "expert", ytitle: "layer" });
}

function drawPairs() {
  const layer = chosen("pair-layer"), counts = DATA.pairs[chosen("pair-data")].counts[layer];
  get("pair-layer-name").textContent = layer + DATA.first;
  const z = counts.map((row, a) => row.map((count, b) => (a === b || !counts[a][a] ? null : percent(count, counts[a][a]))));
  const hover = z.map((row, a) => row.map((share, b) =>
    `expert ${plain(DATA.names[a])}: ${counts[a][a].toLocaleString("en")} tokens<br>of these with expert ${plain(DATA.names[b])}: ` +
    `${counts[a][b].toLocaleString("en")}, ${(share ?? 0).toFixed(1)} %`));
  const names = nameAxis(DATA.names);
  shares("pairs", z, hover, { x: names, y: names, xtitle: "also picked", ytitle: "tokens of expert" });
}

function drawLayers() {
  const { shift, copied } = DATA.choice, sources = shift.map((_, layer) => copied.filter(([z]) => z === layer).map(([, expert]) => expert));
  const why = (of, layer) => (of.length ? `chosen: copies expert ${of.join(", ")}` : "not chosen");
  draw("layers", {
    type: "bar", x: shift.map((_, layer) => layer), y: shift,
    marker: { color: sources.map((of) => variable(of.length ? "ours" : "plain")) },
    text: sources.map((of) => (of.length ? `← ${of.join(", ")}` : "")), textposition: "outside", cliponaxis: false,
    customdata: shift.map((d, layer) => `layer ${layer + DATA.first}<br>shift ${d.toFixed(4)}<br>${why(sources[layer], layer)}`),
    hovertemplate: "%{customdata}<extra></extra>",
  }, { xaxis: { title: { text: "layer" }, showgrid: false, ...layerAxis(shift.length) }, yaxis: { title: { text: "shift of routing", standoff: 8 } }, height: 300 });
}

// --- the page ---

const panels = [];
function panel(redraw, controls) {
  panels.push(redraw);
  controls.forEach((id) => get(id).addEventListener("input", redraw));
}
if (DATA.examples) {
  options("example", DATA.examples.map(({ question }, n) => `${n + 1}: ${question}`));
  options("expert", DATA.names);
  get("layer").value = DATA.extended[0] ?? 0;
  if (DATA.names.length > DATA.base) get("expert").prepend(new Option("all new ones", "new", true, true));
  panel(drawExample, ["example", "layer", "expert"]);
}
if (DATA.loads) {
  options("load-data", DATA.loads.map(({ name }) => name));
  panel(drawLoads, ["load-data"]);
}
if (DATA.pairs) {
  options("pair-data", DATA.pairs.map(({ name }) => name));
  panel(drawPairs, ["pair-data", "pair-layer"]);
}
if (DATA.choice) panel(drawLayers, []);
const drawAll = () => panels.forEach((redraw) => redraw());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
drawAll();
