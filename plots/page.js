"use strict";
const find = (selector, within = document) => within.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const data = JSON.parse(find("#data").textContent);
const names = Object.keys(data.networks);
const get = (row, key) => data.rows[row][data.columns.indexOf(key)] ?? null;
const lines = all("#table tbody tr");  // by row of the data
const [view, search] = [find("#view").elements, find("#search").elements.filter];
const [tip, plot] = [find("#tip"), find("#plot")];
const FLAT = 3;  // as in plots/style.py: a curve so much higher would flatten the others
const off = new Set();  // networks that are switched off
let zoom = null;  // [first, last] layer shown, or null for all
let scene = null;  // the curves and scales that were drawn last
let chosen = {};  // curve (its position) and x of the point that was shown last

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "text", "circle", "rect"].includes(tag);
  const element = document.createElementNS(`http://www.w3.org/${svg ? "2000/svg" : "1999/xhtml"}`, tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function format(value) {
  return value === 0 || Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 ? value.toFixed(4) : value.toExponential(3);
}

// The stroke of a network's curves; black takes the colour of the text, which is white in the dark.
function strokeOf(network) {
  const {color, dashed} = data.networks[network];
  return {stroke: color === "#000000" ? "currentColor" : color, "stroke-dasharray": dashed ? "7 3" : "none"};
}

// One curve for every network, source, member and iteration.
function group() {
  const groups = new Map();
  data.rows.forEach((_, row) => {
    const key = JSON.stringify(["network", "source", "member", "iteration"].map(name => get(row, name)));
    groups.set(key, [...groups.get(key) ?? [], row]);
  });
  const last = Math.max(1, ...data.rows.map((_, row) => get(row, "iteration") ?? 0));
  const seen = new Map();
  return [...groups.values()].map(rows => {
    const [network, source, iteration] = [String(get(rows[0], "network")), get(rows[0], "source"), get(rows[0], "iteration")];
    const style = strokeOf(network);
    if (iteration !== null) style.stroke = `hsl(${260 - 210 * iteration / last} 75% 50%)`;  // from blue to yellow
    if (source !== (seen.get(network) ?? source)) style["stroke-dasharray"] = "2 3";
    seen.set(network, seen.get(network) ?? source);
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
  const stds = view.y.value === "std" && view.paper.checked ? [...data.networks[network].paper] : [];
  if (view.sorted.checked) stds.sort((a, b) => b - a);
  return stds.map((y, i) => ({x: i + 1, y}));
}

// About `count` round numbers between two values; on a wide logarithmic axis 1, 2, 5, 10, ...
function ticks(low, high, count, log = false) {
  const powers = Array.from({length: 40}, (_, i) => 10 ** (i - 20));
  const round = powers.flatMap(power => [1, 2, 5].map(step => Number((step * power).toPrecision(1))));
  if (log && high / low > 5) return round.filter(tick => tick >= low && tick <= high);
  const step = round.find(step => step * count >= high - low);
  const first = Math.ceil(low / step);
  return Array.from({length: Math.floor(high / step) - first + 1}, (_, i) => Number(((first + i) * step).toPrecision(9)));
}

// The place in pixels, between `start` and `end`, of a value between `low` and `high`.
function scale(low, high, start, end, log = false) {
  const place = log ? Math.log : Number;
  return value => start + (place(value) - place(low)) / (place(high) - place(low)) * (end - start);
}

// The ends of both axes: of what is switched on and within the zoom, without what would flatten the rest.
function limits(shown, log) {
  const [left, right] = zoom ?? [0, Math.max(1, ...shown.flatMap(({points}) => points.map(({x}) => x)))];
  const within = ({points}) => points.filter(({x}) => x >= left && x <= right).map(({y}) => y);
  const values = shown.map(within).filter(stds => stds.length);
  let [low, high] = values.length ? [Math.min(...values.flat()), Math.max(...values.flat())] : [1, 2];
  const tops = values.map(stds => Math.max(...stds)).sort((a, b) => a - b);
  const top = Math.max(...tops.filter(top => top <= FLAT * tops[(tops.length - 1) >> 1]));
  const seen = values.every(stds => stds.filter(std => std <= top).length >= stds.length / 2);
  if (!log && low >= 0 && seen) high = Math.min(high, top);
  if (low === high) [low, high] = [low - Math.abs(low) / 2 - 1e-9, high + Math.abs(high) / 2 + 1e-9];
  const rest = log ? (high / low) ** .05 : (high - low) * .05;
  return log ? [left, right, low / rest, high * rest] : [left, right, low < 0 ? low - rest : Math.max(0, low - rest), high + rest];
}

function draw() {
  const width = Math.max(280, plot.clientWidth);
  const height = Math.round(Math.min(560, Math.max(260, width * .42)));
  const [from, to, top, bottom, log] = [56, width - 10, 20, height - 44, view.log.checked];
  const own = curves.filter(({network}) => !off.has(network)).map(curve => ({...curve, points: arrange(curve)}));
  const paper = names.filter(name => !off.has(name)).map(name => ({style: strokeOf(name), points: paperCurve(name)}));
  const [left, right, low, high] = limits([...own, ...paper], log);
  const [x, y] = [scale(left, right, from, to), scale(low, high, bottom, top, log)];
  const svg = make("svg", {viewBox: `0 0 ${width} ${height}`, fill: "currentColor", "font-size": 13, "font-family": "system-ui, sans-serif"});
  const write = (text, attributes) => svg.append(make("text", {"text-anchor": "middle", ...attributes}, text));
  const stroke = (d, attributes) => make("path", {d, fill: "none", stroke: "currentColor", "stroke-linejoin": "round", ...attributes});
  for (const tick of ticks(low, high, 5, log)) {
    svg.append(stroke(`M${from} ${y(tick)}H${to}`, {"stroke-opacity": .12}));
    write(tick, {x: from - 7, y: y(tick) + 4.5, "text-anchor": "end"});
  }
  for (const tick of ticks(left, right, width / 90).filter(Number.isInteger)) write(tick, {x: x(tick), y: bottom + 18});
  write(`${data.x} index (${view.sorted.checked ? "sorted by magnitude" : "original"})`, {x: (from + to) / 2, y: height - 6});
  write(view.y.value, {transform: `translate(13 ${(top + bottom) / 2}) rotate(-90)`});
  svg.append(stroke(`M${from} ${top}V${bottom}H${to}`));
  const box = {x: from, y: top, width: to - from, height: bottom - top};
  const panel = make("svg", {...box, viewBox: Object.values(box).join(" ")});  // what leaves it is clipped
  const trace = points => points.map((point, i) => `${i ? "L" : "M"}${x(point.x).toFixed(1)} ${y(point.y).toFixed(1)}`).join("");
  for (const {points, style} of paper) panel.append(stroke(trace(points), {...style, "stroke-width": .8, "stroke-opacity": .7}));
  for (const {points, style} of own) {
    panel.append(stroke(trace(points), {...style, "stroke-width": width < 600 ? 1.4 : 2}));
    const highest = points.reduce((a, b) => b.y > a.y ? b : a, {y: high});
    if (highest.x >= left && highest.x <= right) write(`\u2191 ${highest.y.toPrecision(3)}`, {x: x(highest.x), y: 12, fill: style.stroke, "text-anchor": "start"});
  }
  svg.append(panel);
  plot.replaceChildren(svg);
  scene = {svg, own, x, y, left, right, from, to, top, bottom, stroke};
  view.all.hidden = zoom === null;
  clear();
  remember();
}

function clear() {
  tip.replaceChildren();
  all(".mark", plot).forEach(mark => mark.remove());
}

// Tell of a point, above the plot, so that no curve is covered.
function show(curve, point) {
  clear();
  chosen = {curve: scene.own.indexOf(curve), x: point.x};
  const [x, y] = [scene.x(point.x), Math.max(scene.top, scene.y(point.y))];
  scene.svg.append(scene.stroke(`M${x} 0V${y - 5}`, {class: "mark", "stroke-opacity": .4}));
  scene.svg.append(make("circle", {class: "mark", cx: x, cy: y, r: 5, fill: "none", stroke: "currentColor", "stroke-width": 1.5}));
  const facts = [...data.quantities, "iteration", "member", "stage", "name", "source"].filter(key => get(point.row, key) !== null);
  const texts = facts.map(key => `${key} ${data.quantities.includes(key) ? format(get(point.row, key)) : get(point.row, key)}`);
  const paper = paperCurve(curve.network).find(other => other.x === point.x);
  if (paper) texts.splice(1, 0, `the paper: ${format(paper.y)}`);
  if (get(point.row, "std_error") !== null) texts[0] += ` \u00b1 ${format(get(point.row, "std_error"))}`;
  if (get(point.row, "dominated")) texts.push("rests on few images");
  const title = make("strong", {}, `${curve.network}, ${data.x} ${get(point.row, data.x)}`);
  const box = make("div", {}, title, ...texts.map(text => make("span", {}, text)));
  tip.append(box);
  box.style.borderColor = curve.style.stroke;
  box.style.marginLeft = `${Math.max(0, Math.min(x - box.offsetWidth / 2, tip.clientWidth - box.offsetWidth))}px`;
}

const inside = point => point.x >= scene.left && point.x <= scene.right;
const closest = (points, distance) => points.reduce((a, b) => distance(b) < distance(a) ? b : a);

function showNearest(x, y) {
  const pairs = scene.own.flatMap(curve => curve.points.filter(inside).map(point => [curve, point]));
  const distance = ([, point]) => Math.hypot(scene.x(point.x) - x, scene.y(point.y) - y);
  const found = pairs.length ? closest(pairs, distance) : null;
  found && distance(found) < 60 ? show(...found) : clear();
}

function zoomTo(from, to) {
  const largest = Math.max(...data.rows.map((_, row) => get(row, data.x)));
  const [low, high] = [Math.max(0, Math.round(from)), Math.min(largest, Math.round(to))];
  if (high - low >= 2) zoom = low === 0 && high === largest ? null : [low, high];
  draw();
}

// Arrow keys go along the curves and from one to another; + and - zoom, 0 shows all. True if a key means something.
function press(key) {
  const shown = scene.own.filter(curve => curve.points.some(inside));
  if (!shown.length) return false;
  const curve = shown.includes(scene.own[chosen.curve]) ? scene.own[chosen.curve] : shown[0];
  const points = curve.points.filter(inside);
  const at = Math.max(0, points.findIndex(point => point.x === chosen.x));
  const along = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: points.length - 1, "": at}[key];
  const turn = {ArrowUp: -1, ArrowDown: 1}[key];
  const half = {"+": .25, "=": .25, "-": 1, 0: Infinity}[key] * (scene.right - scene.left);
  if (along !== undefined) show(curve, points[Math.max(0, Math.min(along, points.length - 1))]);
  else if (turn) {
    const other = shown[(shown.indexOf(curve) + turn + shown.length) % shown.length];
    show(other, closest(other.points.filter(inside), point => Math.abs(point.x - points[at].x)));
  } else if (half) {
    zoomTo(points[at].x - half, points[at].x + half);
    press("");
  } else return false;
  return true;
}

// The state of the view stands in the address, so that it can be sent.
function remember() {
  const state = new URLSearchParams([...off].map(name => ["off", name]));
  if (view.y.selectedIndex > 0) state.set("y", view.y.value);
  for (const name of ["sorted", "log"]) if (view[name].checked) state.set(name, "1");
  if (!view.paper.checked) state.set("paper", "0");
  if (zoom) state.set("layers", zoom.join("-"));
  if (search.value) state.set("filter", search.value);
  history.replaceState(null, "", `#${state}`);
}

function recall() {
  const state = new URLSearchParams(location.hash.slice(1));
  const range = (state.get("layers") ?? "").split("-").map(Number);
  zoom = range[0] >= 0 && range[1] > range[0] ? range : null;
  view.y.value = data.quantities.includes(state.get("y")) ? state.get("y") : data.quantities[0];
  for (const name of ["sorted", "log"]) view[name].checked = state.has(name);
  view.paper.checked = state.get("paper") !== "0";
  search.value = state.get("filter") ?? "";
  off.clear();
  state.getAll("off").forEach(name => off.add(name));
  all("#networks input").forEach((box, i) => { box.checked = !off.has(names[i]); });
  refresh();
}

function refresh() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  lines.forEach((line, row) => {
    const found = words.every(word => line.textContent.toLowerCase().includes(word));
    line.hidden = off.has(String(get(row, "network"))) || !found;
  });
  find("#search output").textContent = `${lines.filter(line => !line.hidden).length} of ${lines.length} rows`;
  draw();
}

// Sort the table by a column; empty cells stay last.
function sortBy(head, key) {
  const sign = head.ariaSort === "ascending" ? -1 : 1;
  const compare = (a, b) => typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", {numeric: true});
  const order = lines.map((line, row) => [get(row, key), line]).sort(([a], [b]) =>
    a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b));
  find("#table tbody").append(...order.map(([, line]) => line));
  all("#table th").forEach(other => { other.ariaSort = "none"; });
  head.ariaSort = sign > 0 ? "ascending" : "descending";
}

function save(suffix, url) {
  make("a", {href: url, download: `${data.title.replace(/[^\w-]+/g, "-")}.${suffix}`}).click();
}

function saveTable() {
  const cell = value => /[",\n\r]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value;
  const rows = [data.columns, ...data.rows.filter((_, row) => !lines[row].hidden)];
  const text = rows.map(row => `${row.map(value => cell(String(value ?? ""))).join(",")}\n`).join("");
  save("csv", `data:text/csv;charset=utf-8,${encodeURIComponent(text)}`);
}

async function savePicture(suffix) {
  const copy = scene.svg.cloneNode(true);
  all(".mark", copy).forEach(mark => mark.remove());
  const [, , width, height] = copy.getAttribute("viewBox").split(" ");
  for (const [key, value] of Object.entries({width, height, color: "#000"})) copy.setAttribute(key, value);
  copy.prepend(make("rect", {width, height, fill: "#fff"}));
  const url = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(copy))}`;
  if (suffix === "svg") return save("svg", url);
  const image = Object.assign(new Image(), {src: url});
  await image.decode();
  const canvas = make("canvas", {width: 2 * width, height: 2 * height});
  canvas.getContext("2d").drawImage(image, 0, 0, 2 * width, 2 * height);
  return save("png", canvas.toDataURL());
}

// Point at a curve, or drag over the layers to zoom to.
function followPointer() {
  let start = null;
  const follow = event => {
    const box = scene.svg.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const [low, high] = [Math.min(x, start ?? x), Math.max(x, start ?? x)];
    const layer = scale(scene.from, scene.to, scene.left, scene.right);
    if (event.type === "pointerdown") start = x;
    if (high - low < 8) showNearest(x, y);
    else if (event.type === "pointerup") zoomTo(layer(low), layer(high));
    else {
      clear();
      scene.svg.append(make("rect", {class: "mark", x: low, width: high - low, y: scene.top, height: scene.bottom - scene.top, "fill-opacity": .12}));
    }
    if (event.type === "pointerup") start = null;
  };
  for (const kind of ["pointerdown", "pointermove", "pointerup"]) plot.addEventListener(kind, follow);
  plot.addEventListener("pointerdown", event => plot.setPointerCapture(event.pointerId));
  plot.addEventListener("pointercancel", () => { start = null; clear(); });
  plot.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") clear(); });
  plot.addEventListener("dblclick", () => zoomTo(0, Infinity));
}

function fillControls() {
  find("#paper").hidden = !names.some(name => data.networks[name].paper.length);
  view.y.append(...data.quantities.map(name => make("option", {value: name}, name)));
  for (const name of names) {
    const box = make("input", {type: "checkbox"});
    box.addEventListener("change", () => { box.checked ? off.delete(name) : off.add(name); refresh(); });
    const line = make("path", {d: "M0 4H30", "stroke-width": 2.5, ...strokeOf(name)});
    find("#networks").append(make("label", {}, box, make("svg", {viewBox: "0 0 30 8", "aria-hidden": "true"}, line), name));
  }
  all("#table th").forEach((head, i) => {
    const button = make("button", {type: "button"}, head.textContent);
    button.addEventListener("click", () => sortBy(head, data.columns[i]));
    head.ariaSort = "none";
    head.replaceChildren(button);
  });
  find("#help").textContent = matchMedia("(pointer: coarse)").matches
    ? "Tap a curve to read a layer; drag sideways to zoom, tap twice for all."
    : "Point at a curve to read a layer; drag to zoom, click twice for all. Keys: left and right for layers, up and down for curves, + and \u2212 to zoom, 0 for all.";
}

function begin() {
  for (const id of ["#curves", "#search"]) find(id).hidden = false;
  fillControls();
  followPointer();
  recall();
  for (const form of all("form")) form.addEventListener("submit", event => event.preventDefault());
  find("#view").addEventListener("change", draw);
  view.all.addEventListener("click", () => zoomTo(0, Infinity));
  search.addEventListener("input", refresh);
  const buttons = find("#save").elements;
  buttons.csv.addEventListener("click", saveTable);
  for (const kind of ["png", "svg"]) buttons[kind].addEventListener("click", () => savePicture(kind));
  plot.addEventListener("keydown", event => {
    if (event.key === "Escape") clear();
    else if (!event.ctrlKey && !event.metaKey && !event.altKey && press(event.key)) event.preventDefault();
  });
  plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) press(""); });
  plot.addEventListener("blur", clear);
  addEventListener("hashchange", recall);
  addEventListener("beforeprint", () => all("details").forEach(part => { part.open = true; }));
  new ResizeObserver(() => {
    const open = tip.childElementCount;
    draw();
    if (open) press("");
  }).observe(plot);
}
if (data.quantities.length) begin();
