"use strict";

// Everything that comes from outside (names, files, errors) becomes text or attributes by the
// document's own methods; no markup is ever put together from strings.

const SVG = "http://www.w3.org/2000/svg";
const at = (id) => document.getElementById(id);
const state = { about: null, picture: null, address: null, found: null, asked: 0, moved: false };

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function draw(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function complain(text) {
  at("problem").textContent = text;
  at("problem").hidden = !text;
}

// The same name has the same colour in every picture.
function colour(name) {
  let hash = 0;
  for (const unit of name) hash = (hash * 31 + unit.codePointAt(0)) % 3600;
  return `hsl(${hash / 10}, 78%, 38%)`;
}

function overlap(a, b) {
  const width = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
  const height = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  if (width <= 0 || height <= 0) return 0;
  const area = (c) => (c[2] - c[0]) * (c[3] - c[1]);
  return (width * height) / (area(a) + area(b) - width * height);
}

// Boxes come best first: of those that overlap by more than half only the first stays. A name's own
// least score counts until somebody moves the slider, which is then for all.
function shown(boxes) {
  const least = Number(at("threshold").value);
  const kept = [];
  for (const each of boxes) {
    if (each.score < (state.moved ? least : each.least ?? least)) continue;
    if (!at("best").checked || kept.every((other) => overlap(each.box, other.box) <= 0.5)) kept.push(each);
  }
  return kept;
}

// Names whose boxes go by a least score of their own, so that the slider's number is not theirs.
function showOwnLeast(boxes) {
  const own = new Map(boxes.filter((each) => each.least !== undefined).map((each) => [each.name, each.least]));
  at("own-least").hidden = state.moved || !own.size;
  const some = [...own].slice(0, 3).map(([name, least]) => `${name} ${least.toFixed(2)}`).join(", ");
  const more = own.size > 3 ? ` and ${own.size - 3} more` : "";
  at("own-least").textContent = `The vocabulary's own, until this is moved: ${some}${more}.`;
}

function light(group, on) {
  for (const other of at("view").querySelectorAll("g")) other.classList.toggle("dim", on && other !== group);
  group.classList.toggle("lit", on);
}

function boxOf(each, size) {
  const [x0, y0, x1, y1] = each.box;
  const group = draw("g", {});
  group.append(draw("rect", { class: "box", x: x0, y: y0, width: x1 - x0, height: y1 - y0, stroke: colour(each.name) }));
  const label = draw("text", { "font-size": size, x: x0 + size * 0.3, y: Math.max(y0, size * 1.3) - size * 0.3 });
  label.textContent = `${each.name} ${each.score.toFixed(2)}`;
  group.append(label);
  return group;
}

// A label's plate can only be measured once its text stands in the picture; it stays inside it.
function underlay(group, name, size, width) {
  const text = group.querySelector("text");
  const wide = text.getBBox().width;
  const left = Math.min(Number(text.getAttribute("x")), width - wide - size * 0.3);
  text.setAttribute("x", Math.max(left, size * 0.3));
  const plate = { x: Number(text.getAttribute("x")) - size * 0.3, y: Number(text.getAttribute("y")) - size, width: wide + size * 0.6, height: size * 1.3, fill: colour(name), rx: size * 0.15 };
  group.insertBefore(draw("rect", plate), text);
}

// Boxes lie on the picture upright. Browsers turn some formats by their EXIF orientation and others
// not, so once the server has told it the page turns the stored pixels itself.
function asSeen({ width, height, orientation }) {
  if (!orientation) return { width, height };
  const [w, h] = orientation > 4 ? [height, width] : [width, height];
  const turns = [
    [1, 0, 0, 1, 0, 0], [-1, 0, 0, 1, w, 0], [-1, 0, 0, -1, w, h], [1, 0, 0, -1, 0, h],
    [0, 1, 1, 0, 0, 0], [0, 1, -1, 0, h, 0], [0, -1, -1, 0, h, w], [0, -1, 1, 0, 0, w],
  ];
  return { class: "stored", width: w, height: h, transform: `matrix(${turns[orientation - 1].join(" ")})` };
}

function redraw() {
  at("threshold-shown").textContent = Number(at("threshold").value).toFixed(2);
  if (!state.found) return;
  const { width, height, boxes } = state.found;
  showOwnLeast(boxes);
  const view = at("view");
  view.setAttribute("viewBox", `0 0 ${width} ${height}`);
  view.replaceChildren(draw("image", { href: state.address, ...asSeen(state.found) }));
  const size = Math.max(width, height) / 42;
  const kept = shown(boxes);
  const rows = [];
  for (const each of [...kept].reverse()) {
    const group = boxOf(each, size);
    view.append(group);
    underlay(group, each.name, size, width);
    const patch = make("i");
    patch.style.background = colour(each.name);
    const row = make("li", { tabindex: "0" }, patch, make("span", {}, each.name), make("b", {}, each.score.toFixed(2)));
    for (const [event, on] of [["mouseenter", true], ["mouseleave", false], ["focus", true], ["blur", false]]) {
      row.addEventListener(event, () => light(group, on));
    }
    rows.unshift(row);
  }
  at("list").replaceChildren(...rows);
  const hidden = boxes.length - kept.length;
  const best = !kept.length && boxes.length ? `; the best scores ${boxes[0].score.toFixed(2)}` : "";
  at("count").textContent = `${kept.length} ${kept.length === 1 ? "box" : "boxes"}${hidden ? `, ${hidden} hidden` : ""}${best}`;
}

// The picture as this browser shows it, before anything has been found in it.
async function showPicture() {
  const bitmap = await createImageBitmap(state.picture).catch(() => null);
  if (!bitmap) return false;
  state.found = { width: bitmap.width, height: bitmap.height, boxes: [] };
  bitmap.close();
  at("invitation").hidden = true;
  at("view").removeAttribute("hidden");
  at("drop").classList.add("full");
  redraw();
  at("count").textContent = "";
  return true;
}

async function take(picture) {
  complain("");
  if (picture.size > state.about.max_bytes) {
    complain(`This file has ${(picture.size / 2 ** 20).toFixed(0)} MB; at most ${state.about.max_bytes / 2 ** 20} MB.`);
    return;
  }
  if (state.address) URL.revokeObjectURL(state.address);
  state.picture = picture;
  state.address = URL.createObjectURL(picture);
  if (!(await showPicture())) {
    complain("This is not a picture that can be shown (JPEG, PNG, WebP or BMP).");
    return;
  }
  at("find").disabled = !state.about.student;
  if (state.about.student) await find();
}

async function find() {
  if (!state.picture || !state.about.student) return;
  const asked = ++state.asked;
  complain("");
  at("busy").hidden = false;
  const kind = /^image\/(jpeg|png|webp|bmp)$/.test(state.picture.type) ? state.picture.type : "application/octet-stream";
  try {
    const answer = await fetch(`/api/predict?words=${encodeURIComponent(at("words").value)}`, {
      method: "POST", headers: { "content-type": kind }, body: state.picture,
    });
    const found = await answer.json();
    if (asked !== state.asked) return;
    if (!answer.ok) return complain(found.error);
    state.found = found;
    redraw();
  } catch {
    if (asked === state.asked) complain("The server does not answer: is it still running?");
  } finally {
    if (asked === state.asked) at("busy").hidden = true;
  }
}

function showExamples(names) {
  names.forEach((name, number) => {
    const picture = make("img", { src: `/examples/${number}`, alt: "", loading: "lazy" });
    const button = make("button", { type: "button", title: name, "aria-label": `try ${name}` }, picture);
    button.addEventListener("click", async () => {
      const answer = await fetch(`/examples/${number}`);
      if (answer.ok) await take(await answer.blob());
      else complain((await answer.json()).error);
    });
    at("examples").append(button);
  });
}

function showAbout(about) {
  const pages = [["/", "pictures and words", true], ["/cache", "the cache", about.cache], ["/curves", "curves", about.curves], ["/report", "report", about.report]];
  for (const [address, title, there] of pages) {
    if (there) at("nav").append(make("a", address === "/" ? { href: address, "aria-current": "page" } : { href: address }, title));
  }
  const names = about.names;
  const some = names.slice(0, 6).join(", ");
  if (!about.student) {
    at("hint").textContent = "No student is served: dkdetr serve RUN.";
  } else if (about.words_problem) {
    at("words").disabled = true;
    at("hint").textContent = `Words cannot be typed: ${about.words_problem} It looks for its own ${names.length} names: ${some} ...`;
  } else {
    at("hint").textContent = `Names, with commas. Empty: the student's own ${names.length}, such as ${some}.`;
  }
  at("words").maxLength = about.max_words;
  at("words").placeholder = names.slice(0, 2).join(", ") || at("words").placeholder;
  at("threshold").value = about.threshold;
  for (const [label, value] of Object.entries(about.about)) at("about").append(make("dt", {}, label), make("dd", {}, value));
  showExamples(about.examples);
}

function listen() {
  at("file").addEventListener("change", (event) => event.target.files.length && take(event.target.files[0]));
  at("find").addEventListener("click", find);
  at("words").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      find();
    }
  });
  at("threshold").addEventListener("input", () => {
    state.moved = true;
    redraw();
  });
  at("best").addEventListener("change", redraw);
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      at("drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop" && event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
    });
  }
  document.addEventListener("paste", (event) => {
    const picture = [...event.clipboardData.files].find((file) => file.type.startsWith("image/"));
    if (picture) take(picture);
  });
}

document.addEventListener("DOMContentLoaded", async () => {
  const answer = await fetch("/api/about");
  state.about = await answer.json();
  showAbout(state.about);
  listen();
  redraw();
  document.body.dataset.ready = "true";
});
