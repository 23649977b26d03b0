"use strict";
// Captions, names and phrases are untrusted: they enter the page as text (textContent, alt), never as HTML.
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const n = data.group.length, MOST = 60, DIM = 0.05;
const names = Object.keys(data.numbers);
// a word matches from its beginning: "cat" finds cats, and nothing scattered
const spaced = (text) => " " + text.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, " ").trimStart();
const texts = data.caption.map((caption, i) => [
  caption, ...data.objects[i].map(([phrase]) => phrase), data.file[i], data.groups[data.group[i]].name,
].map(spaced).join("\n"));
const colour = data.group.map((g) => data.groups[g].colour);
const hidden = new Set(), found = new Uint8Array(n);
let source, plot, looks, pinned = null, sorted = [], waiting = false;

const element = (tag, text = "") => Object.assign(document.createElement(tag), { textContent: text });
const round = (x) => (x === null ? "-" : Number.isInteger(x) ? String(x) : x.toFixed(3));
const percent = (k, of) => (of ? `${((100 * k) / of).toFixed(1)} %` : "-");

// ------------------------------------------------------------------------------ one image

function show(i) {
  const group = data.groups[data.group[i]], image = new Image();
  image.alt = data.caption[i];
  image.src = `data:image/webp;base64,${data.thumb[i]}`;
  $("picture").replaceChildren(data.thumb[i] ? image : `no picture: the file is ${data.missing[i]}`);
  $("card").children[1].hidden = false;
  $("card").dataset.row = i;
  $("caption").textContent = data.caption[i] || "(no caption)";
  $("class").textContent = group.name;
  $("class").style.setProperty("--of", group.colour);
  $("file").textContent = data.file[i];
  $("numbers").replaceChildren(...names.map((name) => pair(name, data.numbers[name][i])));
  $("objects").replaceChildren(...data.objects[i].map(([phrase, cosine]) => pair(phrase, cosine)));
}

function pair(name, value) {
  const row = element("tr");
  row.append(element("td", name), element("td", round(value)));
  row.style.setProperty("--long", `${100 * Math.max(0, Math.min(1, value))}%`);
  return row;
}

function pin(i) {
  pinned = i;
  $("pinned").hidden = i === null;
  if (i !== null) show(i);
}

function gallery() {
  const chosen = source.selected.indices, words = $("search").value.trim();
  const rows = chosen.length > 1 ? chosen : words ? [...found.keys()].filter((i) => found[i]) : [];
  $("gallery").hidden = !rows.length;
  const first = rows.length > MOST ? `, the first ${MOST} of them` : "";
  $("gallery").children[0].textContent =
    `${rows.length.toLocaleString("en")} ${chosen.length > 1 ? "selected" : "match"}${first}`;
  $("gallery").children[1].replaceChildren(...rows.slice(0, MOST).map((i) => {
    const button = element("button"), image = new Image();
    button.title = image.alt = data.caption[i];
    button.style.setProperty("--of", data.groups[data.group[i]].colour);
    if (data.thumb[i]) image.src = `data:image/webp;base64,${data.thumb[i]}`;
    button.append(data.thumb[i] ? image : "no picture");
    button.onclick = () => pin(i);
    return button;
  }));
}

// ------------------------------------------------------------------------------ all images

// One pass over the rows says which are found and flagged; the points follow with the next frame.
function update() {
  const words = $("search").value.split(",").map(spaced).filter((word) => word.trim());
  const score = data.numbers[$("score").value], side = Number($("side").value);
  const cut = sorted[Number($("slider").value)];
  const fill = new Float32Array(n), line = new Float32Array(n), counts = data.groups.map(() => [0, 0]);
  let matching = 0;
  for (let i = 0; i < n; i++) {
    found[i] = !hidden.has(data.group[i]) && words.every((word) => texts[i].includes(word));
    const called = score ? score[i] !== null && side * (score[i] - cut) >= 0 : false;
    line[i] = found[i] ? 0.9 : DIM;
    fill[i] = found[i] ? (called || !score ? 0.8 : 0.08) : DIM;
    matching += found[i];
    if (!found[i] || (score && score[i] === null)) continue;
    counts[data.group[i]][0] += called;
    counts[data.group[i]][1]++;
  }
  for (const [label, id] of [[0, "real"], [1, "fake"]]) {
    const of = counts.filter((_, g) => data.groups[g].label === label);
    const [k, all] = [0, 1].map((j) => of.reduce((sum, count) => sum + count[j], 0));
    $(`${id}-share`).textContent = score ? percent(k, all) : "-";
    $(`${id}-count`).textContent = score ? `${k} of ${all}` : "no threshold";
  }
  $("cut").textContent = score && cut !== undefined ? round(cut) : "";
  $("found").textContent = words.length ? `${matching.toLocaleString("en")} match` : "";
  [...$("legend").children].forEach((row, g) => {
    row.lastChild.textContent = score ? `${counts[g][0]} / ${counts[g][1]}` : counts[g][1];
  });
  looks = { fill, line };
  if (!waiting) waiting = !!requestAnimationFrame(draw);
}

function draw() {
  waiting = false;
  const axis = (id) => Float32Array.from(data.numbers[$(id).value], (value, i) =>
    value === null || hidden.has(data.group[i]) ? NaN : value);
  source.data = { x: axis("x"), y: axis("y"), colour, ...looks };
}

function frame() { // both axes over all images, also those that are hidden, so that nothing jumps
  for (const [id, range, axis] of [["x", plot.x_range, plot.below[0]], ["y", plot.y_range, plot.left[0]]]) {
    const values = data.numbers[$(id).value].filter((value) => value !== null);
    const [low, high] = values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    axis.axis_label = $(id).value;
    if (!values.length) continue;
    const margin = 0.04 * (high - low) || 0.5;
    range.setv({ start: low - margin, end: high + margin });
    range.reset_start = low - margin;
    range.reset_end = high + margin;
    axis.major_label_text_alpha = axis.axis_label.startsWith("UMAP") ? 0 : 1; // it has no unit
  }
  update();
}

function rescore() { // start where one real in twenty is flagged, on the side where the fakes are
  const values = data.numbers[$("score").value] || [];
  const of = (label) => values.filter((v, i) => v !== null && data.groups[data.group[i]].label === label)
    .sort((a, b) => a - b);
  const [real, fake] = [of(0), of(1)], middle = (list) => list[list.length >> 1];
  if (real.length && fake.length) $("side").value = middle(fake) < middle(real) ? -1 : 1;
  const above = $("side").value === "1";
  sorted = values.filter((v) => v !== null).sort((a, b) => a - b);
  const start = real.length ? real[Math.floor((above ? 0.95 : 0.05) * real.length)] : middle(sorted);
  $("slider").max = Math.max(0, sorted.length - 1);
  $("slider").value = sorted.indexOf(start);
  for (const id of ["slider", "side"]) $(id).disabled = !sorted.length;
  update();
}

// ------------------------------------------------------------------------------ the page

async function start() {
  $("made").textContent = data.made;
  $("note").textContent = data.note;
  for (const [id, more] of [["x", []], ["y", []], ["score", ["no threshold"]]]) {
    $(id).append(...[...names, ...more].map((name) => element("option", name)));
    $(id).value = data[id];
  }
  data.groups.forEach((group, g) => {
    const row = element("button"), name = element("span", group.name);
    row.style.setProperty("--of", group.colour);
    row.ariaPressed = "true";
    row.title = `show or hide ${group.name}`;
    row.append(element("i"), name, element("small"));
    row.onclick = () => {
      if (!hidden.delete(g)) hidden.add(g);
      row.ariaPressed = String(!hidden.has(g));
      update();
      gallery();
    };
    $("legend").append(row);
  });
  await Bokeh.embed.embed_item(data.plot, "plot");
  plot = Bokeh.documents[0].get_model_by_name("plot");
  source = Bokeh.documents[0].get_model_by_name("points");
  source.inspect.connect(() => {
    const under = source.inspected.indices;
    if (under.length && pinned === null) show(under[under.length - 1]);
  });
  source.selected.properties.indices.change.connect(() => {
    const chosen = source.selected.indices;
    pin(chosen.length === 1 ? chosen[0] : null);
    gallery();
  });
  $("plot").onclick = () => { if (!source.inspected.indices.length) pin(null); };
  $("search").oninput = () => { update(); gallery(); };
  $("slider").oninput = update;
  $("side").onchange = update;
  $("score").onchange = rescore;
  $("x").onchange = $("y").onchange = frame;
  frame();
  rescore();
  document.body.dataset.ready = "yes";
}
start();
