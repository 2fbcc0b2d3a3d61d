"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
// Text always goes in as text: names of a model can hold anything.
function el(tag, cls, ...kids) {
  const node = document.createElement(tag);
  if (cls) node.className = cls;
  for (const kid of kids) if (kid !== null) node.append(kid);
  return node;
}
function table(heads, rows) {
  const head = el("tr", "", ...heads.map((h) => el("th", h.n ? "n" : "", h.t)));
  const body = rows.map((cells) => el("tr", "", ...cells.map((c, i) => el("td", heads[i].n ? "n" : heads[i].c ? "c" : "", c))));
  return el("table", "", el("thead", "", head), el("tbody", "", ...body));
}
// Rows that differ in the numbers of layers only, together.
function grouped(rows, key) {
  const found = new Map();
  for (const row of rows) {
    const k = JSON.stringify(key(row));
    if (!found.has(k)) found.set(k, []);
    found.get(k).push(row);
  }
  return [...found.values()];
}
const pattern = (path) => path.split(".").map((p) => (/^\d+$/.test(p) ? "*" : p)).join(".");
function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let u = 0;
  while (n >= 1024 && u < 3) { n /= 1024; u++; }
  return (u ? n.toFixed(1) : n.toFixed(0)) + " " + units[u];
}
const times = (n) => (n > 1 ? n + " × " : "");

let graph, spans = [], view = [0, 1], total = 1;

function show(index) {
  graph = data.graphs[index];
  $("cards").replaceChildren(...graph.cards.map(([title, value, note]) =>
    el("div", "card", el("p", "", title), el("strong", "", value), el("p", "", note))));
  $("whole").hidden = !graph.unsharded;
  $("whole").textContent = graph.unsharded ? "Runs whole on every rank: " + graph.unsharded : "";
  $("plan").replaceChildren(table([{ t: "entry", c: 1 }, { t: "" }], grouped(graph.plan, (r) => [pattern(r.entry.split("[")[0]), r.entry.split("[")[1], r.applied, r.detail])
    .map((g) => [times(g.length) + g[0].entry,
      el("span", g[0].applied ? "yes" : "no", (g[0].applied ? "applied " : "not applied: ") + g[0].detail)])));
  const rejected = (a) => Object.entries(a.rejected).map(([name, why]) => name + ": " + why);
  $("attention").replaceChildren(table([{ t: "module", c: 1 }, { t: "method" }, { t: "rejected" }],
    grouped(graph.attentions, (a) => [pattern(a.module), a.method, rejected(a)]).map((g) => [
      el("span", "", times(g.length) + (g.length > 1 ? pattern(g[0].module) : g[0].module || "root"), el("div", "soft", g[0].source)),
      el("span", "chip", g[0].method), el("span", "soft", rejected(g[0]).join("; "))])));
  const implicit = graph.implicit_gathers.filter((g) => g.kind === "implicit");
  $("gathers").hidden = !implicit.length;
  $("implicit").replaceChildren(table([{ t: "operator", c: 1 }, { t: "module", c: 1 }, { t: "line", c: 1 }, { t: "why" }],
    implicit.map((g) => [g.op, g.module, g.source, g.reason])));
  $("letters").textContent = graph.letters || "";
  const heads = [{ t: "kind" }, { t: "module", c: 1 }, { t: "line", c: 1 }, { t: "bytes", n: 1 }, { t: "formula", c: 1 }, { t: "why" }];
  $("collectives").replaceChildren(table([{ t: "value", c: 1 }, ...heads],
    (graph.collectives || []).map((c) => [c[0], el("span", "chip", c[1]), ...c.slice(2, 7)])));
  // Gradients of parameters are many and alike: those of layers of one kind share a row.
  $("gradients").hidden = !(graph.backward || []).length;
  $("backward").replaceChildren(table(heads, grouped(graph.backward || [], (c) => [c[1], pattern(c[2]), c[3], c[6]]).map((g) => [
    el("span", "", times(g.length), el("span", "chip", g[0][1])), g.length > 1 ? pattern(g[0][2]) : g[0][2], g[0][3],
    bytes(g.reduce((sum, c) => sum + c[7], 0)), g.length > 1 ? "" : g[0][5], g[0][6]])));
  $("notes").hidden = !graph.notes.length;
  $("notes").replaceChildren(...graph.notes.map((note) => el("div", "", note)));
  $("screen").textContent = data.screen;
  tree();
  spans = graph.time || [];
  $("timeline").hidden = !spans.length;
  total = Math.max(1e-9, ...spans.map((s) => s[2]).slice(-2000), spans.reduce((m, s) => Math.max(m, s[2]), 0));
  view = [0, total];
  const busy = (lane) => spans.filter((s) => s[3] === lane).reduce((sum, s) => sum + s[2] - s[1], 0);
  $("span").textContent = time(total) + " on " + data.device + " — computing " + time(busy(0)) + ", communicating " + time(busy(1));
  draw();
}
const time = (us) => (us >= 1000 ? (us / 1000).toFixed(2) + " ms" : us.toFixed(1) + " µs");

// --- the timeline

function draw() {
  const canvas = $("lanes"), scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = 150;
  if (!width) return;
  canvas.width = width * scale; canvas.height = height * scale;
  const g = canvas.getContext("2d"), css = getComputedStyle(document.documentElement);
  const color = (name) => css.getPropertyValue(name).trim();
  g.scale(scale, scale);
  g.font = "12px system-ui, sans-serif";
  const x = (t) => ((t - view[0]) / (view[1] - view[0])) * width;
  const step = Math.pow(10, Math.floor(Math.log10((view[1] - view[0]) / 5)));
  g.fillStyle = color("--soft"); g.strokeStyle = color("--line");
  const marks = (view[1] - view[0]) / step > 12 ? step * 2.5 : step;
  for (let t = Math.ceil(view[0] / marks) * marks; t <= view[1]; t += marks) {
    g.beginPath(); g.moveTo(x(t), 18); g.lineTo(x(t), height); g.stroke();
    if (x(t) < width - 50) g.fillText(time(t), x(t) + 3, 12);
  }
  for (const [lane, top, name, text] of [[0, 24, "--compute", "compute"], [1, 90, "--wire", "communication"]]) {
    g.fillStyle = color("--soft"); g.fillText(text, 4, top + 12);
    g.fillStyle = color(name);
    for (const s of spans) {
      if (s[3] !== lane || s[2] < view[0] || s[1] > view[1]) continue;
      const left = x(s[1]), wide = x(s[2]) - left;
      g.fillRect(left, top + 18, Math.max(0.7, wide - (wide > 3 ? 1 : 0)), 34);
    }
  }
}
function at(event) {
  const box = $("lanes").getBoundingClientRect();
  return [view[0] + ((event.clientX - box.left) / box.width) * (view[1] - view[0]), event.clientY - box.top > 88 ? 1 : 0];
}
let drag = null;
$("lanes").addEventListener("wheel", (event) => {
  event.preventDefault();
  const [t] = at(event), f = event.deltaY > 0 ? 1.25 : 0.8;
  view = [Math.max(0, t - (t - view[0]) * f), Math.min(total, t + (view[1] - t) * f)];
  draw();
}, { passive: false });
$("lanes").addEventListener("mousedown", (event) => { drag = [event.clientX, ...view]; });
window.addEventListener("mouseup", () => { drag = null; });
$("lanes").addEventListener("mousemove", (event) => {
  if (drag) {
    const moved = ((drag[0] - event.clientX) / $("lanes").clientWidth) * (drag[2] - drag[1]);
    const by = Math.min(Math.max(moved, -drag[1]), total - drag[2]);
    view = [drag[1] + by, drag[2] + by];
    return draw();
  }
  const [t, lane] = at(event), near = (view[1] - view[0]) / 400;
  const hit = spans.find((s) => s[3] === lane && s[1] - near <= t && t <= s[2] + near);
  const row = hit && graph.rows.find((r) => r[0] === hit[0]);
  $("under").textContent = row ? time(hit[2] - hit[1]) + "  " + row[0] + " = " + row[3] + "  " + row[4] + "  " + row[5] + "  " + (row[6] || "") : "\u00a0";
});
$("lanes").addEventListener("dblclick", () => { view = [0, total]; draw(); });
window.addEventListener("resize", draw);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

// --- the graph by module: children are made when a module is unfolded

function tree() {
  const root = { name: data.model, kids: new Map(), rows: 0, sends: 0, order: [] };
  for (const row of graph.rows || []) {
    let place = root;
    place.rows++; if (row[6]) place.sends++;
    for (const part of row[4] ? row[4].split(".") : []) {
      if (!place.kids.has(part)) {
        const kid = { name: part, kids: new Map(), rows: 0, sends: 0, order: [] };
        place.kids.set(part, kid); place.order.push(kid);
      }
      place = place.kids.get(part);
      place.rows++; if (row[6]) place.sends++;
    }
    place.order.push(row);
  }
  $("tree").replaceChildren(branch(root, true));
}
function branch(place, open) {
  const sends = place.sends ? el("span", "count wire", "▶ " + place.sends) : null;
  const box = el("details", "", el("summary", "", el("code", "", place.name), el("span", "count", place.rows + " values"), sends));
  let made = false;
  const fill = () => {
    if (made || !box.open) return;
    made = true;
    for (const item of place.order) box.append(Array.isArray(item) ? line(item) : branch(item, false));
  };
  box.addEventListener("toggle", fill);
  box.open = open;
  fill();
  return box;
}
function line(row) {
  const cells = [row[0], row[1], row[2], row[3], (row[6] ? "▶ " + row[6] + "  " : "") + row[5]];
  return el("div", row[6] ? "row wire" : "row", ...cells.map((text) => { const s = el("span", "", text); s.title = text; return s; }));
}
let waiting = 0;
$("find").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    const words = $("find").value.toLowerCase().split(/\s+/).filter(Boolean);
    if (!words.length) return tree();
    const hits = graph.rows.filter((row) => words.every((w) => row.join(" ").toLowerCase().includes(w)));
    $("tree").replaceChildren(el("p", "hint", hits.length + " values" + (hits.length > 300 ? ", the first 300" : "")), ...hits.slice(0, 300).map(line));
  }, 120);
});
$("fold").addEventListener("click", () => { $("find").value = ""; tree(); });

if (data.graphs.length > 1) {
  $("graphs").append(...data.graphs.map((_, i) => {
    const button = el("button", i ? "" : "on", "graph " + i);
    button.addEventListener("click", () => {
      for (const other of $("graphs").children) other.className = other === button ? "on" : "";
      show(i);
    });
    return button;
  }));
}
if (data.graphs.length) show(0);
document.body.dataset.ready = "yes";
