"use strict";
const find = (selector, within = document) => within.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const data = JSON.parse(find("#data").textContent);
const names = Object.keys(data.networks);
const column = Object.fromEntries(data.columns.map((key, i) => [key, i]));
const get = (row, key) => data.rows[row][column[key]] ?? null;
const lines = all("#table tbody tr");  // by row of the data
const [view, tip, plot] = [find("#view").elements, find("#tip"), find("#plot")];
const off = new Set();
let zoom = null;  // [first, last] layer shown, or null for all
let scene = null;  // the curves and scales that were drawn last
let chosen = null;  // [curve, point] of the tip

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "text", "line", "circle", "rect", "g"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function format(value) {
  if (typeof value !== "number" || Number.isInteger(value)) return String(value);
  return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 ? value.toFixed(4) : value.toExponential(3);
}

// Black on white is white on black in the dark: such a curve takes the colour of the text.
const stroke = color => color === "#000000" ? "currentColor" : color;

// Curves: one for every network, source, member and iteration.
function group() {
  const groups = new Map();
  data.rows.forEach((_, row) => {
    const key = JSON.stringify(["network", "source", "member", "iteration"].map(name => get(row, name)));
    groups.set(key, [...groups.get(key) ?? [], row]);
  });
  const curves = [...groups.values()].map(rows => ({network: String(get(rows[0], "network")), rows}));
  const last = Math.max(1, ...data.rows.map((_, row) => get(row, "iteration") ?? 0));
  for (const curve of curves) {
    const {color, dashed} = data.networks[curve.network];
    const iteration = get(curve.rows[0], "iteration");
    curve.color = iteration === null ? stroke(color) : `hsl(${260 - 210 * iteration / last} 75% 50%)`;
    const second = curves.find(other => other.network === curve.network) !== curve;
    curve.dash = second && iteration === null ? "2 3" : dashed ? "7 3" : "none";
  }
  return curves;
}
const curves = group();

function arrange(curve) {
  const points = curve.rows.map(row => ({row, x: get(row, data.x), y: get(row, view.y.value)}));
  const known = points.filter(({y}) => y !== null && (!view.log.checked || y > 0)).sort((a, b) => a.x - b.x);
  if (!view.sorted.checked) return known;
  const places = known.map(point => point.x);
  return known.sort((a, b) => b.y - a.y).map((point, i) => ({...point, x: places[i]}));
}

function paperCurve(network) {
  const stds = view.y.value === "std" && view.paper.checked ? data.networks[network].paper : [];
  const order = view.sorted.checked ? [...stds].sort((a, b) => b - a) : stds;
  return order.map((y, i) => ({x: i + 1, y}));
}

// Round numbers between two values, about `count` of them.
function ticks(low, high, count, log) {
  if (log && high / low > 5) {
    const powers = Array.from({length: 24}, (_, i) => 10 ** (i - 12));
    return powers.flatMap(power => [1, 2, 5].map(step => step * power)).filter(tick => tick >= low && tick <= high);
  }
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find(factor => factor * power >= rough) * power;
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({length: Math.floor(high / step - first + 1e-9) + 1}, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

// Where a value lies on an axis from `start` to `end`, in pixels.
function scale(low, high, start, end, log) {
  const place = log ? Math.log : Number;
  return value => start + (place(value) - place(low)) / (place(high) - place(low)) * (end - start);
}

function limits(shown, log) {
  const [left, right] = zoom ?? [0, Math.max(1, ...shown.flatMap(({points}) => points.map(({x}) => x)))];
  const values = shown.flatMap(({points}) => points.filter(({x}) => x >= left && x <= right).map(({y}) => y));
  let [low, high] = values.length ? [Math.min(...values), Math.max(...values)] : [log ? 1 : 0, 2];
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - 1, high + 1];
  const rest = log ? (high / low) ** .05 : (high - low) * .05;
  return [left, right, log ? low / rest : low >= 0 ? Math.max(0, low - rest) : low - rest, log ? high * rest : high + rest];
}

function draw() {
  const width = Math.max(280, plot.clientWidth);
  const height = Math.round(Math.min(560, Math.max(260, width * .42)));
  const [from, to, top, bottom] = [56, width - 10, 8, height - 44];
  const log = view.log.checked;
  const own = curves.filter(({network}) => !off.has(network)).map(curve => ({...curve, points: arrange(curve)}));
  const paper = names.filter(name => !off.has(name)).map(name => ({
    color: stroke(data.networks[name].color), dash: data.networks[name].dashed ? "7 3" : "none", points: paperCurve(name)}));
  const [left, right, low, high] = limits([...own, ...paper], log);
  const [x, y] = [scale(left, right, from, to, false), scale(low, high, bottom, top, log)];
  const svg = make("svg", {viewBox: `0 0 ${width} ${height}`, fill: "currentColor", "font-size": 13, "font-family": "system-ui, sans-serif"});
  for (const tick of ticks(low, high, 5, log)) {
    svg.append(make("line", {x1: from, x2: to, y1: y(tick), y2: y(tick), stroke: "currentColor", "stroke-opacity": .12}));
    svg.append(make("text", {x: from - 7, y: y(tick) + 4.5, "text-anchor": "end"}, String(tick)));
  }
  for (const tick of ticks(left, right, width / 90).filter(Number.isInteger)) {
    svg.append(make("text", {x: x(tick), y: bottom + 18, "text-anchor": "middle"}, String(tick)));
  }
  svg.append(make("path", {d: `M${from} ${top}V${bottom}H${to}`, fill: "none", stroke: "currentColor"}));
  const order = view.sorted.checked ? "sorted by magnitude" : "original";
  svg.append(make("text", {x: (from + to) / 2, y: height - 6, "text-anchor": "middle"}, `${data.x} index (${order})`));
  svg.append(make("text", {transform: `translate(13 ${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle"}, view.y.value));
  const panel = make("svg", {x: from, y: top, width: to - from, height: bottom - top, viewBox: `${from} ${top} ${to - from} ${bottom - top}`});
  const trace = (curve, style) => panel.append(make("path", {fill: "none", stroke: curve.color, "stroke-dasharray": curve.dash, "stroke-linejoin": "round",
    d: curve.points.map((point, i) => `${i ? "L" : "M"}${x(point.x).toFixed(1)} ${y(point.y).toFixed(1)}`).join(""), ...style}));
  paper.filter(({points}) => points.length).forEach(curve => trace(curve, {"stroke-width": .8, "stroke-opacity": .6}));
  own.forEach(curve => trace(curve, {"stroke-width": 2}));
  svg.append(panel);
  plot.replaceChildren(svg);
  scene = {svg, own, x, y, left, right, from, to, top, bottom};
  view.all.hidden = zoom === null;
  clear();
  remember();
}

// What is known of a point stands above the plot, so that it covers no curve.
function clear() {
  tip.replaceChildren();
  all(".mark", plot).forEach(mark => mark.remove());
}

function show(curve, point) {
  clear();
  chosen = {curve: scene.own.indexOf(curve), x: point.x};
  const [x, y] = [scene.x(point.x), scene.y(point.y)];
  scene.svg.append(make("line", {class: "mark", x1: x, x2: x, y1: 0, y2: y - 5, stroke: "currentColor", "stroke-opacity": .4}));
  scene.svg.append(make("circle", {class: "mark", cx: x, cy: y, r: 5, fill: "none", stroke: "currentColor", "stroke-width": 1.5}));
  const paper = paperCurve(curve.network).find(other => other.x === point.x);
  const facts = ["iteration", "member", ...data.quantities, "stage", "name", "source"].filter(key => get(point.row, key) !== null);
  const texts = facts.map(key => `${key} ${format(get(point.row, key))}`);
  const error = get(point.row, "std_error");
  if (error !== null) texts.splice(facts.indexOf("std") + 1, 0, `± ${format(error)}`);
  if (paper) texts.splice(1, 0, `the paper: ${format(paper.y)}`);
  if (get(point.row, "dominated")) texts.push("rests on few images");
  const title = make("strong", {}, `${curve.network}, ${data.x} ${get(point.row, data.x)}`);
  const box = make("div", {}, title, ...texts.map(text => make("span", {}, text)));
  box.style.borderColor = curve.color;
  tip.append(box);
  box.style.marginLeft = `${Math.max(0, Math.min(x - box.offsetWidth / 2, tip.clientWidth - box.offsetWidth))}px`;
}

const inside = point => point.x >= scene.left && point.x <= scene.right;

function nearest(x, y) {
  let [best, reach] = [null, 60];
  for (const curve of scene.own) {
    for (const point of curve.points.filter(inside)) {
      const distance = Math.hypot(scene.x(point.x) - x, scene.y(point.y) - y);
      if (distance < reach) [best, reach] = [[curve, point], distance];
    }
  }
  best ? show(...best) : clear();
}

function zoomTo(from, to) {
  const largest = Math.max(...curves.flatMap(curve => curve.rows.map(row => get(row, data.x))));
  const [low, high] = [Math.max(0, Math.round(from)), Math.min(largest, Math.round(to))];
  zoom = high - low < 2 || (low === 0 && high === largest) ? zoom && (high - low < 2) ? zoom : null : [low, high];
  draw();
}

// Arrow keys go along the curves and from one to another; + and - zoom, 0 shows all.
function press(key) {
  const shown = scene.own.filter(curve => curve.points.some(inside));
  if (!shown.length) return false;
  const curve = shown.includes(scene.own[chosen?.curve]) ? scene.own[chosen.curve] : shown[0];
  const points = curve.points.filter(inside);
  const at = Math.max(0, points.findIndex(point => point.x === chosen?.x));
  const along = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: points.length - 1, "": at}[key];
  const turn = {ArrowUp: -1, ArrowDown: 1}[key];
  const factor = {"+": .5, "=": .5, "-": 2}[key];
  if (along !== undefined) show(curve, points[Math.max(0, Math.min(along, points.length - 1))]);
  else if (turn) {
    const other = shown[(shown.indexOf(curve) + turn + shown.length) % shown.length];
    const gap = point => Math.abs(point.x - points[at].x);
    show(other, other.points.filter(inside).reduce((a, b) => gap(b) < gap(a) ? b : a));
  } else if (factor) {
    const half = (scene.right - scene.left) / 2 * factor;
    zoomTo(points[at].x - half, points[at].x + half);
    press("");
  } else if (key === "0") zoomAll();
  else return false;
  return true;
}

function zoomAll() {
  zoom = null;
  draw();
}

// The state of the view stands in the address, so that it can be sent.
function remember() {
  const state = new URLSearchParams();
  if (view.y.selectedIndex) state.set("y", view.y.value);
  for (const name of ["sorted", "log"]) if (view[name].checked) state.set(name, "1");
  if (!view.paper.checked) state.set("paper", "0");
  for (const name of off) state.append("off", name);
  if (zoom) state.set("layers", zoom.join("-"));
  if (find("#search").filter.value) state.set("filter", find("#search").filter.value);
  history.replaceState(null, "", `#${state}`);
}

function recall() {
  const state = new URLSearchParams(location.hash.slice(1));
  view.y.value = data.quantities.includes(state.get("y")) ? state.get("y") : data.quantities[0];
  for (const name of ["sorted", "log"]) view[name].checked = state.has(name);
  view.paper.checked = state.get("paper") !== "0";
  off.clear();
  state.getAll("off").forEach(name => off.add(name));
  all("#networks input").forEach((box, i) => { box.checked = !off.has(names[i]); });
  const range = /^(\d+)-(\d+)$/.exec(state.get("layers") ?? "");
  zoom = range && Number(range[1]) < Number(range[2]) ? [Number(range[1]), Number(range[2])] : null;
  find("#search").filter.value = state.get("filter") ?? "";
  refresh();
}

function refresh() {
  draw();
  filter();
}

function filter() {
  const words = find("#search").filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = lines.filter((line, row) => {
    const text = line.textContent.toLowerCase();
    line.hidden = off.has(String(get(row, "network"))) || !words.every(word => text.includes(word));
    return !line.hidden;
  });
  find("#search output").textContent = `${shown.length} of ${lines.length} rows`;
  remember();
}

// Columns are sorted by buttons in their heads; empty cells stay last.
function sortBy(head, key) {
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const compare = (a, b) => typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", {numeric: true});
  const order = lines.map((line, row) => [get(row, key), line]).sort(([a], [b]) =>
    a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b));
  find("#table tbody").append(...order.map(([, line]) => line));
  all("#table th").forEach(other => other.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
}

function download(name, url) {
  make("a", {href: url, download: `${data.title.replace(/[^\w-]+/g, "-")}.${name}`}).click();
}

const save = {
  csv() {
    const cell = value => /[",\n\r]/.test(value ?? "") ? `"${String(value).replaceAll('"', '""')}"` : value ?? "";
    const rows = [data.columns, ...data.rows.filter((_, row) => !lines[row].hidden)].map(row => row.map(cell).join(","));
    download("csv", `data:text/csv;charset=utf-8,${encodeURIComponent(`${rows.join("\n")}\n`)}`);
  },
  picture() {
    clear();
    const copy = scene.svg.cloneNode(true);
    const [, , width, height] = copy.getAttribute("viewBox").split(" ");
    for (const [key, value] of Object.entries({width, height, color: "#000"})) copy.setAttribute(key, value);
    copy.prepend(make("rect", {width, height, fill: "#fff"}));
    return [`data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(copy))}`, width, height];
  },
  svg() { download("svg", save.picture()[0]); },
  async png() {
    const [url, width, height] = save.picture();
    const image = new Image();
    image.src = url;
    await image.decode();
    const canvas = make("canvas", {width: 2 * width, height: 2 * height});
    canvas.getContext("2d").drawImage(image, 0, 0, 2 * width, 2 * height);
    download("png", canvas.toDataURL());
  },
};

function drag() {
  let start = null;
  const place = event => {
    const box = scene.svg.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const layer = x => scene.left + (x - scene.from) / (scene.to - scene.from) * (scene.right - scene.left);
  plot.addEventListener("pointerdown", event => { start = place(event)[0]; plot.setPointerCapture(event.pointerId); });
  plot.addEventListener("pointermove", event => {
    const [x, y] = place(event);
    if (start === null || Math.abs(x - start) < 8) return nearest(x, y);
    clear();
    const edges = {x: Math.min(x, start), width: Math.abs(x - start), y: scene.top, height: scene.bottom - scene.top};
    scene.svg.append(make("rect", {class: "mark", ...edges, "fill-opacity": .12}));
  });
  plot.addEventListener("pointerup", event => {
    const [x, y] = place(event);
    if (start !== null && Math.abs(x - start) >= 8) zoomTo(layer(Math.min(x, start)), layer(Math.max(x, start)));
    else nearest(x, y);
    start = null;
  });
  plot.addEventListener("pointercancel", () => { start = null; clear(); });
  plot.addEventListener("pointerleave", event => { if (event.pointerType === "mouse" && start === null) clear(); });
  plot.addEventListener("dblclick", zoomAll);
}

function begin() {
  if (!data.quantities.length) return;
  for (const id of ["#chart-title", "#chart", "#search"]) find(id).hidden = false;
  find("#paper").hidden = !names.some(name => data.networks[name].paper.length);
  view.y.append(...data.quantities.map(name => make("option", {value: name}, name)));
  for (const name of names) {
    const {color, dashed} = data.networks[name];
    const line = make("path", {d: "M0 4H30", stroke: stroke(color), "stroke-width": 2.5, "stroke-dasharray": dashed ? "7 3" : "none"});
    const box = make("input", {type: "checkbox"});
    box.addEventListener("change", () => { box.checked ? off.delete(name) : off.add(name); refresh(); });
    find("#networks").append(make("label", {}, box, make("svg", {viewBox: "0 0 30 8", "aria-hidden": "true"}, line), name));
  }
  find("#help").textContent = matchMedia("(pointer: coarse)").matches
    ? "Tap a curve to read a layer; drag sideways to zoom in."
    : "Point at a curve to read a layer; drag to zoom in. Keys: left and right for layers, up and down for curves, + and − to zoom, 0 for all.";
  for (const form of all("form")) form.addEventListener("submit", event => event.preventDefault());
  find("#view").addEventListener("change", draw);
  view.all.addEventListener("click", zoomAll);
  find("#search").addEventListener("input", filter);
  for (const kind of ["csv", "png", "svg"]) find("#save").elements[kind].addEventListener("click", save[kind]);
  all("#table th").forEach((head, i) => {
    const button = make("button", {type: "button"}, head.textContent);
    button.addEventListener("click", () => sortBy(head, data.columns[i]));
    head.setAttribute("aria-sort", "none");
    head.replaceChildren(button);
  });
  plot.addEventListener("keydown", event => {
    if (event.key === "Escape") clear();
    else if (!event.ctrlKey && !event.metaKey && !event.altKey && press(event.key)) event.preventDefault();
  });
  plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) press(""); });
  plot.addEventListener("blur", clear);
  drag();
  recall();
  addEventListener("hashchange", recall);
  new ResizeObserver(() => { if (scene.svg.viewBox.baseVal.width !== Math.max(280, plot.clientWidth)) draw(); }).observe(plot);
  addEventListener("beforeprint", () => all("details").forEach(part => { part.open = true; }));
}
begin();
