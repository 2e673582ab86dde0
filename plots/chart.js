"use strict";
// The curves of a page: from the data in it to an SVG, and what is told of a point.
const find = selector => document.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const data = JSON.parse(find("#data").textContent);
const names = Object.keys(data.networks);
const get = (row, key) => data.rows[row][data.columns.indexOf(key)] ?? null;
const [view, tip, plot] = [find("#view").elements, find("#tip"), find("#plot")];
const SVG = "http://www.w3.org/2000/svg";
const FLAT = 3;  // as in plots/style.py: a curve so much higher would flatten the others
let off = new Set();  // networks that are switched off
let zoom = null;  // [first, last] layer shown, or null for all
let scene = null;  // the curves and scales that were drawn last
let chosen = {};  // curve (its position) and x of the point that was shown last

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "text", "circle", "rect"].includes(tag);
  const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function format(value) {
  const plain = value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5);
  return plain ? value.toFixed(4) : value.toExponential(3);
}

// The stroke of a network; black takes the colour of the text, which is white in the dark.
function strokeOf(network) {
  const {color, dashed} = data.networks[network];
  const stroke = color === "#000000" ? "currentColor" : color;
  return {stroke, "stroke-dasharray": dashed ? "7 3" : "none"};
}

// One curve for every network, source, member and iteration.
function group() {
  const groups = new Map();
  data.rows.forEach((_, row) => {
    const parts = ["network", "source", "member", "iteration"].map(name => get(row, name));
    const key = JSON.stringify(parts);
    groups.set(key, [...groups.get(key) ?? [], row]);
  });
  const last = Math.max(1, ...data.rows.map((_, row) => get(row, "iteration") ?? 0));
  const sources = new Map();
  return [...groups.values()].map(rows => {
    const network = String(get(rows[0], "network"));
    const [source, iteration] = [get(rows[0], "source"), get(rows[0], "iteration")];
    const style = strokeOf(network);
    if (iteration !== null) style.stroke = `hsl(${260 - 210 * iteration / last} 75% 50%)`;
    if (!sources.has(network)) sources.set(network, source);
    if (sources.get(network) !== source) style["stroke-dasharray"] = "2 3";
    return {network, rows, style};
  });
}
const curves = group();

function arrange(curve) {
  const [quantity, least] = [view.y.value, view.log.checked ? 0 : -Infinity];
  const points = curve.rows.map(row => ({row, x: get(row, data.x), y: get(row, quantity)}));
  const known = points.filter(({y}) => y !== null && y > least).sort((a, b) => a.x - b.x);
  if (!view.sorted.checked) return known;
  const places = known.map(point => point.x);
  return known.sort((a, b) => b.y - a.y).map((point, i) => ({...point, x: places[i]}));
}

function paperCurve(network) {
  const shown = view.y.value === "std" && view.paper.checked;
  const stds = shown ? [...data.networks[network].paper] : [];
  if (view.sorted.checked) stds.sort((a, b) => b - a);
  return stds.map((y, i) => ({x: i + 1, y}));
}

// About `count` round numbers between two values; on a wide logarithmic axis 1, 2, 5, 10, ...
function ticks(low, high, count, log = false) {
  const place = i => Number(`${[1, 2, 5][i % 3]}e${Math.floor(i / 3) - 20}`);
  const round = Array.from({length: 120}, (_, i) => place(i));
  if (log && high / low > 5) return round.filter(tick => tick >= low && tick <= high);
  const step = round.find(step => step * count >= high - low);
  const [first, last] = [Math.ceil(low / step), Math.floor(high / step)];
  const all = Array.from({length: last - first + 1}, (_, i) => (first + i) * step);
  return all.map(tick => Number(tick.toPrecision(9)));
}

// Map `low` to `high` onto the pixels from `start` to `end`.
function scale(low, high, start, end, log = false) {
  const place = log ? Math.log : Number;
  return value => start + (place(value) - place(low)) / (place(high) - place(low)) * (end - start);
}

// The ends of both axes, for the curves that are on and the layers that are zoomed to.
function limits(shown, log) {
  const largest = Math.max(1, ...shown.flatMap(({points}) => points.map(({x}) => x)));
  const [left, right] = zoom ?? [0, largest];
  const within = ({points}) => points.filter(({x}) => x >= left && x <= right).map(({y}) => y);
  const values = shown.map(within).filter(stds => stds.length);
  if (!values.length) return [left, right, 1, 2];
  const low = Math.min(...values.flat());
  let high = Math.max(...values.flat());
  const tops = values.map(stds => Math.max(...stds)).sort((a, b) => a - b);
  const top = Math.max(...tops.filter(top => top <= FLAT * tops[(tops.length - 1) >> 1]));
  const most = stds => stds.filter(std => std <= top).length >= stds.length / 2;
  if (!log && low >= 0 && values.every(most)) high = top;  // what flattens the others is clipped
  const rest = log ? (high / low) ** .05 : (high - low) * .05;
  const half = Math.abs(low) / 2 || 1;
  if (low === high) return [left, right, low - half, low + half];
  if (log) return [left, right, low / rest, high * rest];
  return [left, right, low < 0 ? low - rest : Math.max(0, low - rest), high + rest];
}

function draw() {
  const width = Math.max(280, plot.clientWidth);
  const height = Math.round(Math.min(560, Math.max(260, width * .42)));
  const [from, to, top, bottom] = [56, width - 10, 20, height - 44];
  const on = network => !off.has(network);
  const own = curves.filter(({network}) => on(network));
  const paper = names.filter(on).map(name => ({style: strokeOf(name), points: paperCurve(name)}));
  scene = {width, height, from, to, top, bottom, paper};
  scene.own = own.map(curve => ({...curve, points: arrange(curve)}));
  const log = view.log.checked;
  const [left, right, low, high] = limits([...scene.own, ...paper], log);
  const [x, y] = [scale(left, right, from, to), scale(low, high, bottom, top, log)];
  const style = {fill: "currentColor", "font-size": 13, "font-family": "system-ui, sans-serif"};
  const svg = make("svg", {viewBox: `0 0 ${width} ${height}`, ...style});
  scene = {...scene, svg, x, y, left, right, low, high};
  drawAxes(log);
  drawCurves();
  plot.replaceChildren(svg);
  view.all.hidden = zoom === null;
  clear();
}

function write(text, attributes) {
  scene.svg.append(make("text", {"text-anchor": "middle", ...attributes}, text));
}

function stroke(d, attributes = {}) {
  const style = {fill: "none", stroke: "currentColor", "stroke-linejoin": "round"};
  return make("path", {d, ...style, ...attributes});
}

function drawAxes(log) {
  const {svg, x, y, from, to, top, bottom, left, right, low, high} = scene;
  for (const tick of ticks(low, high, 5, log)) {
    svg.append(stroke(`M${from} ${y(tick)}H${to}`, {"stroke-opacity": .12}));
    write(tick, {x: from - 7, y: y(tick) + 4.5, "text-anchor": "end"});
  }
  const layers = ticks(left, right, scene.width / 90).filter(Number.isInteger);
  for (const tick of layers) write(tick, {x: x(tick), y: bottom + 18});
  const order = view.sorted.checked ? "sorted by magnitude" : "original";
  write(`${data.x} index (${order})`, {x: (from + to) / 2, y: scene.height - 6});
  write(view.y.value, {transform: `translate(13 ${(top + bottom) / 2}) rotate(-90)`});
  svg.append(stroke(`M${from} ${top}V${bottom}H${to}`));
}

function drawCurves() {
  const {svg, own, paper, x, y, from, to, top, bottom} = scene;
  const box = {x: from, y: top, width: to - from, height: bottom - top};
  const panel = make("svg", {...box, viewBox: Object.values(box).join(" ")});  // it clips
  const place = point => `${x(point.x).toFixed(1)} ${y(point.y).toFixed(1)}`;
  const trace = points => points.length ? `M${points.map(place).join("L")}` : "";
  const thin = {"stroke-width": .8, "stroke-opacity": .7};
  const thick = {"stroke-width": scene.width < 600 ? 1.4 : 2};
  for (const {points, style} of paper) panel.append(stroke(trace(points), {...style, ...thin}));
  for (const {points, style} of own) {
    panel.append(stroke(trace(points), {...style, ...thick}));
    const highest = points.reduce((a, b) => b.y > a.y ? b : a, {y: scene.high});
    const where = {x: x(highest.x), y: 12, fill: style.stroke, "text-anchor": "start"};
    if (inside(highest)) write(`\u2191 ${highest.y.toPrecision(3)}`, where);
  }
  svg.append(panel);
}

const inside = point => point.x >= scene.left && point.x <= scene.right;
const closest = (points, distance) => points.reduce((a, b) => distance(b) < distance(a) ? b : a);

function clear() {
  tip.replaceChildren();
  all(".mark", plot).forEach(mark => mark.remove());
}

// Tell of a point, above the plot, so that no curve is covered.
function show(curve, point) {
  clear();
  chosen = {curve: scene.own.indexOf(curve), x: point.x};
  const [x, y] = [scene.x(point.x), Math.max(scene.top, scene.y(point.y))];
  const ring = {cx: x, cy: y, r: 5, fill: "none", stroke: "currentColor", "stroke-width": 1.5};
  scene.svg.append(stroke(`M${x} 0V${y - 5}`, {class: "mark", "stroke-opacity": .4}));
  scene.svg.append(make("circle", {class: "mark", ...ring}));
  const box = make("div", {style: `border-color: ${curve.style.stroke}`});
  box.append(make("strong", {}, `${curve.network}, ${data.x} ${get(point.row, data.x)}`));
  box.append(...describe(curve.network, point).map(text => make("span", {}, text)));
  tip.append(box);
  const place = Math.min(x - box.offsetWidth / 2, tip.clientWidth - box.offsetWidth);
  box.style.marginLeft = `${Math.max(0, place)}px`;
}

function describe(network, {row, x}) {
  const known = key => get(row, key) !== null;
  const numbers = data.quantities.filter(known);
  const words = ["iteration", "member", "stage", "name", "source"].filter(known);
  const texts = numbers.map(key => `${key} ${format(get(row, key))}`);
  const error = get(row, "std_error");
  if (error !== null) texts[0] += ` \u00b1 ${format(error)}`;
  const paper = paperCurve(network).find(other => other.x === x);
  if (paper) texts.splice(1, 0, `the paper: ${format(paper.y)}`);
  const flag = get(row, "dominated") ? ["rests on few images"] : [];
  return [...texts, ...words.map(key => `${key} ${get(row, key)}`), ...flag];
}
