// The studio's pages beside htmx: messages, choosing, copying, search, dropped files, curves.
"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const on = (name, work) => document.addEventListener(name, work);

// messages: a refusal of the studio, or that it is gone
function tell(text) {
  const told = document.getElementById("told");
  told.textContent = text;
  told.hidden = !text;
  clearTimeout(tell.timer);
  if (text) tell.timer = setTimeout(() => tell(""), 12000);
}
on("htmx:responseError", e => tell(e.detail.xhr.responseText || "The studio refused this."));
on("htmx:sendError", () => tell("The studio does not answer: is it running? Runs go on without it."));
on("htmx:afterRequest", e => {
  if (e.detail.successful && document.getElementById("told").textContent.startsWith("The studio does not")) tell("");
});

// Enter in a field starts nothing
on("submit", e => { if (e.target.id === "new") e.preventDefault(); });

on("click", e => {
  const button = e.target.closest("button");
  if (!button) return;
  const data = button.dataset;
  if (data.opens) document.getElementById(data.opens).showModal();
  if (data.closes) document.getElementById(data.closes).close();
  if (data.fill) {
    const field = button.closest("form").elements.find;
    field.value = data.fill;
    field.focus();
  }
  if (data.add) {
    const field = document.getElementById(data.into);
    const lines = field.value.split("\n").map(l => l.trim()).filter(Boolean);
    lines.push(...data.add.split("\n").filter(line => !lines.includes(line)));
    field.value = lines.join("\n");
  }
  if (data.choose) {
    const field = document.getElementById(data.into);
    document.getElementById("chooser").close();
    if (!field) { location.reload(); return; }
    const lines = field.matches("textarea") ? field.value.split("\n").filter(l => l.trim() && l !== data.choose) : [];
    field.value = [...lines, data.choose].join("\n");
    field.focus();
    field.dispatchEvent(new Event("change", {bubbles: true}));
  }
  const text = data.copyFrom ? document.querySelector(data.copyFrom).textContent : data.copy;
  if (text) {
    navigator.clipboard.writeText(text).then(() => {
      const before = button.textContent;
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = before; }, 1500);
    }, () => tell("The browser did not allow to copy: mark the text by hand."));
  }
});

// usual values change with the purpose
on("htmx:afterSettle", () => {
  for (const at of all("[data-usual]")) {
    const field = document.getElementById("f-" + at.id.slice(3)), usual = at.dataset.usual;
    if (!field) continue;
    if (field.options) field.options[0].textContent = usual ? usual + " (usual)" : "not given";
    else if (field.placeholder !== usual && (usual || field.list === null)) field.placeholder = usual;
  }
});

// search of options
function search() {
  const field = document.getElementById("find");
  if (!field) return;
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  const given = document.querySelector("[data-changed]").checked;
  let count = 0;
  for (const row of all("#more .field")) {
    const input = row.querySelector("input, select, textarea");
    const fits = words.every(w => row.dataset.words.includes(w)) && (!given || input.value !== "");
    row.hidden = !fits;
    count += fits;
  }
  for (const part of all("#more details.section")) {
    part.hidden = !part.querySelector(".field:not([hidden])");
    if (words.length || given) part.open = !part.hidden;
  }
  document.getElementById("found").textContent = words.length || given ? count + " found" : "";
}
on("input", e => { if (e.target.matches("[data-find], [data-changed]")) search(); });

// files from the browser
async function takeIn(files) {
  const place = document.getElementById("drop"), said = place.querySelector("[role=status]");
  const wanted = files.filter(f => /\.(png|jpe?g|webp|bmp|gif|tiff?|avif|heic|heif|jxl|txt|caption|jsonl|csv|zip)$|(^|\/)crops\.json$/i.test(f.path));
  if (!wanted.length) { said.textContent = "no images, captions or zip among them"; return; }
  const top = wanted[0].path.includes("/") ? wanted[0].path.split("/")[0] : wanted[0].path.replace(/\.zip$/i, "");
  const name = (wanted.length === 1 && !/\.zip$/i.test(wanted[0].path) || !wanted[0].path.includes("/") && wanted.length > 1
    ? "images" : top).replace(/[^\w .-]/g, "_").replace(/^\.+/, "").slice(0, 60) + "-" + Date.now().toString(36);
  let folder = "";
  for (const [i, file] of wanted.entries()) {
    said.textContent = (i + 1) + " of " + wanted.length + ": " + file.path;
    const body = new FormData();
    body.append("set", name);
    body.append("path", file.path.includes("/") ? file.path.split("/").slice(1).join("/") : file.path);
    body.append("file", file.file);
    const answer = await fetch("/new/upload", {method: "POST", body});
    const text = await answer.text();
    if (!answer.ok) { tell(text); continue; }
    folder = text;
  }
  said.textContent = folder ? wanted.length + " files are in " + folder : "nothing was taken in";
  if (!folder) return;
  const field = document.getElementById("f-folder");
  field.value = folder;
  field.dispatchEvent(new Event("change", {bubbles: true}));
}
async function entries(item, path) {
  if (item.isFile) return [{path: path + item.name, file: await new Promise((yes, no) => item.file(yes, no))}];
  const reader = item.createReader(), found = [];
  for (;;) {
    const some = await new Promise((yes, no) => reader.readEntries(yes, no));
    if (!some.length) return found;
    for (const one of some) found.push(...await entries(one, path + item.name + "/"));
  }
}
on("change", e => {
  if (e.target.id !== "files") return;
  e.stopPropagation();
  takeIn([...e.target.files].map(file => ({path: file.name, file})));
});
on("dragover", e => { if (e.target.closest("#drop")) { e.preventDefault(); e.target.closest("#drop").classList.add("over"); } });
on("dragleave", e => { const drop = e.target.closest && e.target.closest("#drop"); if (drop) drop.classList.remove("over"); });
on("drop", async e => {
  const drop = e.target.closest("#drop");
  if (!drop) return;
  e.preventDefault();
  drop.classList.remove("over");
  const items = [...e.dataTransfer.items].map(i => i.webkitGetAsEntry()).filter(Boolean);
  const found = [];
  for (const item of items) found.push(...await entries(item, ""));
  takeIn(found);
});

// the output shows its end, unless one has scrolled back
let atEnd = true;
on("htmx:beforeSwap", e => {
  const log = e.detail.target;
  if (log.id === "log") atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
});
const toEnd = () => { const log = document.getElementById("log"); if (log && atEnd) log.scrollTop = log.scrollHeight; };
on("htmx:afterSettle", toEnd);
on("DOMContentLoaded", toEnd);

// crops by hand: dragged by their middle or their corner, or moved and sized by keys
const LEAST_PART = .05, NEAR = 22;
const cropOf = svg => {
  const frame = svg.querySelector("rect"), box = svg.viewBox.baseVal, part = +svg.dataset.part;
  const [left, top, width, height] = ["x", "y", "width", "height"].map(n => +frame.getAttribute(n));
  return {frame, left, top, width, height, part, box, across: box.width - width, down: box.height - height};
};
function placeCrop(svg, left, top, part) {
  const c = cropOf(svg), inside = (v, most) => Math.min(Math.max(v, 0), Math.max(most, 0));
  part = Math.min(Math.max(part, LEAST_PART), 1);
  const width = c.width / c.part * part, height = c.height / c.part * part;
  left = inside(left, c.box.width - width); top = inside(top, c.box.height - height);
  Object.entries({x: left, y: top, width, height}).forEach(([name, value]) => c.frame.setAttribute(name, value));
  c.frame.classList.remove("random");
  svg.dataset.part = part;
  svg.querySelector(".away").setAttribute("d", `M0 0h${c.box.width}v${c.box.height}h-${c.box.width}z` +
    `M${left} ${top}h${width}v${height}h-${width}z`);
  svg.querySelector(".grip").setAttribute("d", `M${left + width} ${top + height}h0`);
  const percent = v => Math.round(100 * v) + " %", enlarged = svg.dataset.bucket / width;
  svg.setAttribute("aria-valuenow", Math.round(100 * part));
  svg.setAttribute("aria-valuetext", `${percent(part)} of the largest, ` +
    `${percent(left / c.box.width)} from the left, ${percent(top / c.box.height)} from above`);
  const card = svg.closest(".image");
  card.querySelector("[data-seen]").textContent = `${Math.round(width)}×${Math.round(height)} pixels`;
  card.querySelector("[data-enlarged]").textContent = enlarged > 1.005 ? `, enlarged ${enlarged.toFixed(2)} times` : "";
}
async function keepCrop(svg, given) {
  const card = svg.closest(".image"), c = cropOf(svg), body = named(card);
  if (given) {
    body.set("x", (c.left + c.width / 2) / c.box.width);
    body.set("y", (c.top + c.height / 2) / c.box.height);
    body.set("part", c.part);
  }
  try {
    const answer = await fetch("/images/crop", {method: "POST", body}), text = await answer.text();
    if (!answer.ok) { tell(text); return; }
    card.querySelector(".said").textContent = text;
    card.querySelector(".crop-acts").hidden = !given;
    for (const cut of all("[data-cut]", card)) cut.hidden = given;
  } catch (error) { tell("The studio does not answer: the crop is not saved."); }
}
let dragged = null;
on("pointerdown", e => {
  const svg = e.target.closest("[data-crop]");
  if (!svg || e.button || e.pointerType === "touch" && document.activeElement !== svg) return;
  const c = cropOf(svg), screen = svg.getScreenCTM();
  const corner = new DOMPoint(c.left + c.width, c.top + c.height).matrixTransform(screen);
  const sizes = Math.hypot(corner.x - e.clientX, corner.y - e.clientY) < NEAR;
  dragged = {svg, c, sizes, x: e.clientX, y: e.clientY, scale: 1 / screen.a, moved: false};
  svg.setPointerCapture(e.pointerId);
});
on("pointermove", e => {
  if (!dragged) return;
  const {svg, c, sizes, scale} = dragged, right = (e.clientX - dragged.x) * scale, down = (e.clientY - dragged.y) * scale;
  dragged.moved = true;
  if (!sizes) { placeCrop(svg, c.left + right, c.top + down, c.part); return; }
  const wanted = Math.max((c.width + right) / c.width, (c.height + down) / c.height);
  const most = Math.min((c.box.width - c.left) / c.width, (c.box.height - c.top) / c.height);
  placeCrop(svg, c.left, c.top, c.part * Math.min(wanted, most));
});
for (const end of ["pointerup", "pointercancel"]) on(end, () => {
  if (dragged && dragged.moved) keepCrop(dragged.svg, true);
  dragged = null;
});
const ARROWS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
const SIZES = {"+": 1, "=": 1, "-": -1, "−": -1, "_": -1};
on("keydown", e => {
  const svg = e.target.closest("[data-crop]"), way = ARROWS[e.key], larger = SIZES[e.key];
  if (!svg || !(way || larger) || e.ctrlKey || e.metaKey || e.altKey) return;
  e.preventDefault();
  const c = cropOf(svg), step = e.shiftKey ? .1 : .02;
  if (way) placeCrop(svg, c.left + way[0] * c.across * step, c.top + way[1] * c.down * step, c.part);
  else {  // about its middle
    const part = Math.min(Math.max(c.part + larger * .05, LEAST_PART), 1), grown = part / c.part - 1;
    placeCrop(svg, c.left - c.width * grown / 2, c.top - c.height * grown / 2, part);
  }
  clearTimeout(svg.timer);
  svg.timer = setTimeout(() => keepCrop(svg, true), 500);
});
on("click", e => {
  if (!e.target.closest("[data-middle]")) return;
  const svg = e.target.closest(".image").querySelector("[data-crop]"), c = cropOf(svg);
  const width = c.width / c.part, height = c.height / c.part;
  placeCrop(svg, (c.box.width - width) / 2, (c.box.height - height) / 2, 1);
  svg.focus();
  keepCrop(svg, false);
});

// masks, drawn with a brush by hand or by keys: the canvas is black where the image is not trained, else clear
const brush = {undo: []};
function maskParts() {
  const dialog = document.getElementById("mask"), canvas = dialog.querySelector("canvas");
  return {dialog, canvas, pen: canvas.getContext("2d", {willReadFrequently: true})};
}
function remember(canvas, pen) {
  brush.undo.push(pen.getImageData(0, 0, canvas.width, canvas.height));
  if (brush.undo.length > 20) brush.undo.shift();
}
const fetched = address => new Promise((yes, no) => {
  const image = new Image();
  image.onload = () => yes(image);
  image.onerror = no;
  image.src = address;
});
const named = card => new URLSearchParams(["folder", "name"].map(n => [n, card.querySelector(`[name=${n}]`).value]));
async function openMask(card) {
  const {dialog, canvas, pen} = maskParts(), query = named(card);
  brush.card = card; brush.undo = [];
  dialog.querySelector("h2").textContent = "Mask of " + query.get("name");
  try {
    const shown = await fetched("/images/thumbnail?large&" + query);
    const sides = [shown.naturalWidth, shown.naturalHeight], scale = Math.max(1, 512 / Math.max(...sides));
    [canvas.width, canvas.height] = sides.map(side => Math.max(1, Math.round(side * scale)));
    dialog.querySelector("img").src = shown.src;
    if (card.querySelector(".masked")) {
      pen.globalCompositeOperation = "source-over";
      pen.drawImage(await fetched(`/images/mask?${query}&${Date.now()}`), 0, 0, canvas.width, canvas.height);
      const data = pen.getImageData(0, 0, canvas.width, canvas.height);
      for (let i = 0; i < data.data.length; i += 4) {
        data.data[i + 3] = 255 - data.data[i];
        data.data.fill(0, i, i + 3);
      }
      pen.putImageData(data, 0, 0);
    }
    dialog.showModal();
    [brush.draws, brush.down] = [false, false];
    document.getElementById("mask-said").textContent = "";
    moveBrush([canvas.width / 2, canvas.height / 2]);
  } catch (error) { tell("The image or its mask cannot be shown."); }
}
const brushWidth = ({dialog, canvas}) => dialog.querySelector("[name=size]").value / 100 * Math.max(canvas.width, canvas.height);
const wayOut = dialog => dialog.querySelector("[name=way]:checked").value === "out";
function moveBrush(at) {
  const parts = maskParts(), {dialog, canvas} = parts, shown = dialog.querySelector(".brush");
  brush.at = [canvas.width, canvas.height].map((side, i) => Math.min(Math.max(at[i], 0), side));
  [shown.style.left, shown.style.top] = [brush.at[0] / canvas.width, brush.at[1] / canvas.height].map(part => 100 * part + "%");
  shown.style.width = 100 * brushWidth(parts) / canvas.width + "%";
  shown.classList.toggle("down", Boolean(brush.down || brush.draws));
}
function stroke(from, to) {
  const parts = maskParts(), {dialog, pen} = parts;
  pen.globalCompositeOperation = wayOut(dialog) ? "source-over" : "destination-out";
  pen.lineWidth = brushWidth(parts);
  pen.lineCap = pen.lineJoin = "round";
  pen.beginPath();
  pen.moveTo(...from);
  pen.lineTo(...to);
  pen.stroke();
}
function drawTo(at, draws) {
  const from = brush.at;
  moveBrush(at);
  if (draws) stroke(from, brush.at);
}
function pointed(e) {
  const {canvas} = maskParts(), box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
  return [(e.clientX - box.left) * scale, (e.clientY - box.top) * scale];
}
on("pointerdown", e => {
  if (!e.target.matches("#mask canvas") || e.button) return;
  const {canvas, pen} = maskParts();
  remember(canvas, pen);
  [brush.draws, brush.down] = [true, false];
  canvas.setPointerCapture(e.pointerId);
  moveBrush(pointed(e));
  stroke(brush.at, brush.at);
});
on("pointermove", e => { if (brush.draws || e.target.matches("#mask canvas")) drawTo(pointed(e), brush.draws); });
for (const end of ["pointerup", "pointercancel"]) on(end, () => {
  if (!brush.draws) return;
  brush.draws = false;
  moveBrush(brush.at);
});
on("input", e => { if (e.target.matches("#mask [name=size]")) moveBrush(brush.at); });
const BRUSH_KEYS = {
  " ": ({canvas, pen}) => {
    brush.down = !brush.down;
    if (!brush.down) return;
    remember(canvas, pen);
    stroke(brush.at, brush.at);
  },
  x: ({dialog}) => { dialog.querySelector(`[name=way][value=${wayOut(dialog) ? "in" : "out"}]`).checked = true; },
  z: () => { brush.down = false; fillMask("undo"); },
};
on("keydown", e => {
  if (!e.target.matches("#mask canvas") || e.altKey || e.metaKey) return;
  const parts = maskParts(), {dialog, canvas} = parts, way = ARROWS[e.key], wider = SIZES[e.key], act = BRUSH_KEYS[e.key.toLowerCase()];
  if (!way && !wider && !act || e.ctrlKey && e.key.toLowerCase() !== "z") return;
  e.preventDefault();
  const size = dialog.querySelector("[name=size]");
  if (wider) size.value = +size.value + wider;
  if (act && !e.repeat) act(parts);
  const step = e.shiftKey ? Math.max(canvas.width, canvas.height) / 10 : Math.max(1, brushWidth(parts) / 2);
  drawTo(way ? brush.at.map((v, i) => v + way[i] * step) : brush.at, way && brush.down);
  const [x, y] = [brush.at[0] / canvas.width, brush.at[1] / canvas.height].map(part => Math.round(100 * part));
  document.getElementById("mask-said").textContent = `${x} % from the left, ${y} % from above; brush ${brush.down ? "down" : "up"}, ` +
    `${size.value} % wide, ${wayOut(dialog) ? "not trained" : "trained"}`;
});
function fillMask(how) {
  const {canvas, pen} = maskParts();
  if (how === "undo") {
    if (brush.undo.length) pen.putImageData(brush.undo.pop(), 0, 0);
    return;
  }
  remember(canvas, pen);
  pen.globalCompositeOperation = how === "invert" ? "xor" : "source-over";
  if (how === "all") pen.clearRect(0, 0, canvas.width, canvas.height);
  else pen.fillRect(0, 0, canvas.width, canvas.height);
}
async function keepMask() {
  const {dialog, canvas} = maskParts(), card = brush.card, body = named(card), address = "/images/mask?" + body;
  const out = document.createElement("canvas");
  [out.width, out.height] = [canvas.width, canvas.height];
  const pen = out.getContext("2d");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, out.width, out.height);
  pen.drawImage(canvas, 0, 0);
  body.set("mask", out.toDataURL("image/png"));
  try {
    const answer = await fetch("/images/mask", {method: "POST", body}), text = await answer.text();
    if (!answer.ok) { tell(text); return; }
    card.querySelector(".said").textContent = text;
    const over = card.querySelector(".masked") || document.createElement("img");
    over.remove();
    if (text.startsWith("mask")) {
      [over.className, over.alt, over.src] = ["masked", "masked", `${address}&${Date.now()}`];
      card.querySelector(".well").append(over);
    }
    dialog.close();
    card.querySelector("[data-mask]").focus();
  } catch (error) { tell("The studio does not answer: the mask is not saved."); }
}
on("click", e => {
  const button = e.target.closest("button");
  if (!button) return;
  if ("mask" in button.dataset) openMask(button.closest(".image"));
  if (button.dataset.fillMask) fillMask(button.dataset.fillMask);
  if ("keepMask" in button.dataset) keepMask();
});

// samples by step
on("input", e => {
  const steps = e.target.dataset && e.target.dataset.steps;
  if (!steps) return;
  const step = steps.split(" ")[e.target.value];
  e.target.parentElement.querySelector("output").textContent = step === "0" ? "0 steps: the base" : step + " steps";
  for (const image of all("#samples img")) image.src = "/runs/" + image.dataset.run + "/sample/" + step + "/" + image.dataset.name;
});

// images of a grid by strength and file
on("input", e => {
  if (!e.target.dataset || !e.target.dataset.pick) return;
  const grid = e.target.closest("[data-grid]"), rows = JSON.parse(grid.dataset.rows), at = {file: 0, strength: 0};
  for (const slider of all("[data-pick]", grid)) {
    at[slider.dataset.pick] = +slider.value;
    const name = String(JSON.parse(slider.dataset.names)[slider.value]);
    slider.parentElement.querySelector("output").textContent = name;
    slider.setAttribute("aria-valuetext", name);
  }
  const row = rows[at.file][at.strength];
  for (const image of all("[data-column]", grid)) image.src = grid.dataset.grid + (row * grid.dataset.columns + +image.dataset.column);
});

// curves
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const CHARTS = [["Loss", n => n === "loss" || n === "loss, smoothed"],
  ["Learning rate", n => n === "lr" || n.startsWith("lr/")], ["Gradient norm", n => n === "grad_norm"],
  ["Validation", n => n.startsWith("val")]];
const TONES = ["--accent", "--warn", "--good", "--out"];
let drawn = {}, latest = null;
function draw(place, curves) {
  latest = curves;
  const some = CHARTS.map(([title, wanted]) => {
    let names = Object.keys(curves).filter(wanted);
    if (names.length > 1) names = names.filter(n => n !== "lr");
    return [title, names];
  }).filter(([, names]) => names.length);
  const key = JSON.stringify(some) + innerWidth + matchMedia("(prefers-color-scheme: dark)").matches;
  if (drawn.key === key) {
    some.forEach(([, names], i) => drawn.charts[i].setData([curves.step, ...names.map(n => curves[n])]));
    return;
  }
  if (drawn.charts) drawn.charts.forEach(u => u.destroy());
  drawn = {key, charts: []};
  const boxes = some.map(() => document.createElement("div"));
  boxes.forEach(box => { box.className = "chart"; });
  place.replaceChildren(...boxes);
  some.forEach(([title, names], i) => {
    const grid = {stroke: css("--line"), width: 1}, axis = {stroke: css("--soft"), grid, ticks: grid};
    const faint = n => n === "loss" && names.length > 1;
    const series = [{label: "step"}, ...names.map((n, k) => ({label: n, spanGaps: true,
      stroke: css(TONES[k % TONES.length]) + (faint(n) ? "66" : ""), width: faint(n) ? 1 : 2,
      points: {show: u => u.data[0].length < 40}}))];
    const written = (u, values) => values.map(v =>
      v && Math.abs(v) < .01 ? v.toExponential(1).replace(".0", "") : String(+v.toPrecision(3)));
    const u = new uPlot({title, width: boxes[i].clientWidth - 20, height: 220, series, scales: {x: {time: false}},
      axes: [axis, {...axis, size: 64, values: written}], cursor: {drag: {x: true, y: false}}},
      [curves.step, ...names.map(n => curves[n])], boxes[i]);
    u.root.setAttribute("role", "img");
    u.root.setAttribute("aria-label", title + " by step");
    drawn.charts.push(u);
  });
}
async function follow(place) {
  let over = false;
  try {
    const answer = await fetch(place.dataset.curves);
    const found = await answer.json();
    over = found.over;
    if (found.curves.step) draw(place, found.curves);
  } catch (error) { /* the studio is away for a moment */ }
  if (!over) setTimeout(() => follow(place), 3000);
}
on("DOMContentLoaded", () => {
  const place = document.getElementById("charts");
  if (place) follow(place);
  addEventListener("resize", () => { if (place && latest) draw(place, latest); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (place && latest) draw(place, latest); });
});
