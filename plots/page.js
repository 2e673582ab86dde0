// What one can do with a page: look at points, zoom, switch, filter, sort and download.
const lines = all("#table tbody tr");  // by row of the data
const search = find("#search").elements.filter;
const boxes = all("#view input");
const HELP = "Point at a curve to read a layer; drag to zoom, click twice for all. Keys: left and "
  + "right for layers, up and down for curves, + and \u2212 to zoom, 0 for all.";
const TOUCH = "Tap a curve to read a layer; drag sideways to zoom, tap twice for all.";

function redraw() {
  draw();
  remember();
}

function refresh() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  lines.forEach((line, row) => {
    const found = words.every(word => line.textContent.toLowerCase().includes(word));
    line.hidden = off.has(String(get(row, "network"))) || !found;
  });
  const count = lines.filter(line => !line.hidden).length;
  find("#search output").textContent = `${count} of ${lines.length} rows`;
  redraw();
}

function showNearest(x, y) {
  const pairsOf = curve => curve.points.filter(inside).map(point => [curve, point]);
  const pairs = scene.own.flatMap(pairsOf);
  const distance = ([, point]) => Math.hypot(scene.x(point.x) - x, scene.y(point.y) - y);
  const found = pairs.length ? closest(pairs, distance) : null;
  found && distance(found) < 60 ? show(...found) : clear();
}

function zoomTo(from, to) {
  const largest = Math.max(...data.rows.map((_, row) => get(row, data.x)));
  const [low, high] = [Math.max(0, Math.round(from)), Math.min(largest, Math.round(to))];
  if (high - low >= 2) zoom = low === 0 && high === largest ? null : [low, high];
  redraw();
}

// Do what a key means, if anything: arrows show other points, + and - zoom, 0 shows all layers.
function press(key) {
  const shown = scene.own.filter(curve => curve.points.some(inside));
  if (!shown.length) return false;
  const curve = shown.includes(scene.own[chosen.curve]) ? scene.own[chosen.curve] : shown[0];
  const points = curve.points.filter(inside);
  const last = points.length - 1;
  const at = Math.max(0, points.findIndex(point => point.x === chosen.x));
  const along = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last, "": at}[key];
  const turn = {ArrowUp: -1, ArrowDown: 1}[key];
  const half = {"+": .25, "=": .25, "-": 1, 0: Infinity}[key] * (scene.right - scene.left);
  if (along !== undefined) show(curve, points[Math.max(0, Math.min(along, last))]);
  else if (turn) {
    const other = shown[(shown.indexOf(curve) + turn + shown.length) % shown.length];
    const gap = point => Math.abs(point.x - points[at].x);
    show(other, closest(other.points.filter(inside), gap));
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
  for (const {name, checked} of boxes.filter(box => box.checked !== box.defaultChecked)) {
    state.set(name, Number(checked));
  }
  if (zoom) state.set("layers", zoom.join("-"));
  if (search.value) state.set("filter", search.value);
  history.replaceState(null, "", `#${state}`);
}

function recall() {
  const state = new URLSearchParams(location.hash.slice(1));
  const range = (state.get("layers") ?? "").split("-").map(Number);
  zoom = range[0] >= 0 && range[1] > range[0] ? range : null;
  view.y.value = data.quantities.includes(state.get("y")) ? state.get("y") : data.quantities[0];
  for (const box of boxes) {
    box.checked = state.has(box.name) ? state.get(box.name) === "1" : box.defaultChecked;
  }
  search.value = state.get("filter") ?? "";
  off = new Set(state.getAll("off"));
  all("#networks input").forEach((box, i) => { box.checked = !off.has(names[i]); });
  refresh();
}

// Sort the table by a column; empty cells stay last.
function sortBy(head, key) {
  const sign = head.ariaSort === "ascending" ? -1 : 1;
  const words = (a, b) => String(a).localeCompare(String(b), "en", {numeric: true});
  const compare = (a, b) => typeof a === "number" ? a - b : words(a, b);
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
  const quote = text => /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  const rows = [data.columns, ...data.rows.filter((_, row) => !lines[row].hidden)];
  const write = row => `${row.map(value => quote(String(value ?? ""))).join(",")}\n`;
  save("csv", `data:text/csv;charset=utf-8,${encodeURIComponent(rows.map(write).join(""))}`);
}

async function savePicture(suffix) {
  const {width, height} = scene;
  const copy = scene.svg.cloneNode(true);
  all(".mark", copy).forEach(mark => mark.remove());
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  copy.setAttribute("color", "#000");
  copy.prepend(make("rect", {width, height, fill: "#fff"}));
  const text = encodeURIComponent(new XMLSerializer().serializeToString(copy));
  const url = `data:image/svg+xml;charset=utf-8,${text}`;
  if (suffix === "svg") return save("svg", url);
  const image = Object.assign(new Image(), {src: url});
  await image.decode();
  const canvas = make("canvas", {width: 2 * width, height: 2 * height});
  canvas.getContext("2d").drawImage(image, 0, 0, 2 * width, 2 * height);
  return save("png", canvas.toDataURL());
}

// Show the point that is nearest to the pointer; a drag zooms to the layers that it passes.
function followPointer() {
  let start = null;
  const follow = event => {
    const frame = scene.svg.getBoundingClientRect();
    const [x, y] = [event.clientX - frame.left, event.clientY - frame.top];
    const [low, high] = [Math.min(x, start ?? x), Math.max(x, start ?? x)];
    const layer = scale(scene.from, scene.to, scene.left, scene.right);
    const box = {x: low, y: scene.top, width: high - low, height: scene.bottom - scene.top};
    if (event.type === "pointerdown") start = x;
    if (high - low < 8) showNearest(x, y);
    else if (event.type === "pointerup") zoomTo(layer(low), layer(high));
    else {
      clear();
      scene.svg.append(make("rect", {class: "mark", "fill-opacity": .12, ...box}));
    }
    if (event.type === "pointerup") start = null;
  };
  for (const kind of ["down", "move", "up"]) plot.addEventListener(`pointer${kind}`, follow);
  plot.addEventListener("pointerdown", event => plot.setPointerCapture(event.pointerId));
  plot.addEventListener("pointercancel", () => { start = null; clear(); });
  plot.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") clear(); });
  plot.addEventListener("dblclick", () => zoomTo(0, Infinity));
}

function addSwitch(name) {
  const box = make("input", {type: "checkbox"});
  box.addEventListener("change", () => {
    box.checked ? off.delete(name) : off.add(name);
    refresh();
  });
  const line = make("path", {d: "M0 4H30", "stroke-width": 2.5, ...strokeOf(name)});
  const sample = make("svg", {viewBox: "0 0 30 8", "aria-hidden": "true"}, line);
  find("#networks").append(make("label", {}, box, sample, name));
}

function fillControls() {
  for (const id of ["#curves", "#search"]) find(id).hidden = false;
  find("#paper").hidden = !names.some(name => data.networks[name].paper.length);
  find("#help").textContent = matchMedia("(pointer: coarse)").matches ? TOUCH : HELP;
  view.y.append(...data.quantities.map(name => make("option", {value: name}, name)));
  names.forEach(addSwitch);
  all("#table th").forEach((head, i) => {
    const button = make("button", {type: "button"}, head.textContent);
    button.addEventListener("click", () => sortBy(head, data.columns[i]));
    head.ariaSort = "none";
    head.replaceChildren(button);
  });
}

function begin() {
  fillControls();
  followPointer();
  recall();
  find("#view").addEventListener("change", redraw);
  view.all.addEventListener("click", () => zoomTo(0, Infinity));
  search.addEventListener("input", refresh);
  for (const button of all("#save button")) {
    const call = button.name === "csv" ? saveTable : () => savePicture(button.name);
    button.addEventListener("click", call);
  }
  plot.addEventListener("keydown", event => {
    const command = event.ctrlKey || event.metaKey || event.altKey;
    if (event.key === "Escape") clear();
    else if (!command && press(event.key)) event.preventDefault();
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
