// Expression of faces by camera or file: transformers.js and the ONNX export, all on this device.
//
// A square of the picture is resized as Pillow does it in Python, so that probabilities are Python's.

import {
  AutoImageProcessor, AutoModelForImageClassification, RawImage, env,
} from "./vendor/transformers.min.js";

const COLOURS = {
  Neutral: "#8a8f98", Anger: "#c8443b", Disgust: "#6f9a3e", Fear: "#7b5bb0",
  Happiness: "#e3a62a", Sadness: "#3f78b5", Surprise: "#2a9d94", Other: "#b0718f",
};
const SHOWN = 30; // seconds of the timeline
const KEPT = 36000; // judged frames that the CSV holds at most: an hour at ten a second
const PAUSE = 100; // least milliseconds from one judged frame to the next
const EDGE = 4096; // pixels of the longer side above which a photo is shrunk

const $ = (id) => document.getElementById(id);
const parameters = new URLSearchParams(location.search);
const square = { x: 0, y: 0, side: 0 }; // in pixels of the picture
const rows = []; // [seconds, probabilities] of the judged frames
let model, processor, names;
let margin = 0; // that the model's faces have around them, in units of their side
let source = null; // the canvas or the video that is looked at
let showing = 0; // number of what is looked at: what comes late of an earlier one is dropped

// --- Model ---

/** Load the model of `?model=`: a folder beside this page (default: model), or the Hub's org/name. */
async function load() {
  const where = parameters.get("model") ?? "./model";
  const dtype = parameters.get("dtype") ?? "fp32";
  const base = new URL("./", location.href);
  env.backends.onnx.wasm.wasmPaths = {
    mjs: new URL("vendor/ort-wasm-simd-threaded.mjs", base).href,
    wasm: new URL("vendor/ort-wasm-simd-threaded.wasm", base).href,
  };
  let id = where;
  if (/^[.\/]|:/.test(where)) {
    const folder = new URL(where.replace(/\/*$/, ""), base);
    if (folder.origin !== location.origin) {
      throw new Error("model must be a folder of this site, such as ./model, or the Hub's org/name");
    }
    id = folder.href.split("/").pop();
    env.localModelPath = folder.href.slice(0, -id.length);
    env.allowLocalModels = true;
    env.allowRemoteModels = env.useBrowserCache = env.useWasmCache = false; // a new export shows at once
  }
  processor = await AutoImageProcessor.from_pretrained(id);
  processor.do_resize = false; // done by `resize` below
  model = await AutoModelForImageClassification.from_pretrained(id, { dtype, device: "wasm" });
  const { id2label, crop } = model.config;
  names = Object.keys(id2label).map((number) => id2label[number]);
  guide(crop);
}

/** Tell how to place the square so that it holds what the model learnt from, and frame the face in it. */
function guide(crop) {
  margin = crop?.margin ?? 0;
  const inside = (value) => (value + margin) / (1 + 2 * margin); // from the crop without its margin to the square
  const percent = (value) => `${Math.round(100 * value)} %`;
  const height = (points) => percent(inside((points[0][1] + points[1][1]) / 2));
  let how = "the square onto one, forehead to chin, cheek to cheek.";
  if (!crop) {
    how += " The export does not say how the model's faces were cut out: see crop in the model's own config.json.";
  } else if (crop.points) {
    const [eyes, mouth] = [height(crop.points.slice(0, 2)), height(crop.points.slice(3))];
    how = `the square onto one, and turn the head upright, eyes at ${eyes} of its height, mouth at ${mouth}.`;
  } else if (margin) {
    how = "the square until its dashed frame holds one, forehead to chin, cheek to cheek.";
    $("face").style.setProperty("--inset", inside(0));
    $("face").hidden = false;
  }
  $("guide").textContent = `The page does not look for faces: drag ${how}`;
}

/** Class probabilities of a square picture's pixels, RGBA. */
export async function classify(pixels, side) {
  const size = processor.size.height ?? processor.size.shortest_edge;
  const face = new RawImage(resize(pixels, side, size), size, size, 3);
  const { logits } = await model(await processor(face));
  const values = Array.from(logits.data);
  const largest = Math.max(...values);
  const raised = values.map((value) => Math.exp(value - largest));
  const total = raised.reduce((sum, value) => sum + value, 0);
  return raised.map((value) => value / total);
}

/** Resize square RGBA pixels to RGB as `PIL.Image.resize` does with BILINEAR, to the bit: what is shrunk is
 * weighted by a triangle, in whole numbers of 22 binary places, first along rows, then along columns. */
export function resize(pixels, from, to) {
  const weights = triangle(from, to);
  const wide = new Uint8ClampedArray(from * to * 3);
  const out = new Uint8ClampedArray(to * to * 3);
  const half = 1 << 21;
  for (let y = 0; y < from; y++) {
    weights.forEach(([start, parts], x) => {
      for (let band = 0; band < 3; band++) {
        let sum = half;
        for (let i = 0; i < parts.length; i++) sum += parts[i] * pixels[4 * (y * from + start + i) + band];
        wide[3 * (y * to + x) + band] = sum >> 22;
      }
    });
  }
  weights.forEach(([start, parts], y) => {
    for (let at = 0; at < 3 * to; at++) {
      let sum = half;
      for (let i = 0; i < parts.length; i++) sum += parts[i] * wide[3 * to * (start + i) + at];
      out[3 * to * y + at] = sum >> 22;
    }
  });
  return out;
}

/** For each of `to` pixels, the first of the `from` pixels that count and their weights. */
function triangle(from, to) {
  const scale = from / to;
  const reach = Math.max(scale, 1);
  return Array.from({ length: to }, (_, place) => {
    const middle = (place + 0.5) * scale;
    const start = Math.max(0, Math.trunc(middle - reach + 0.5));
    const end = Math.min(from, Math.trunc(middle + reach + 0.5));
    const raw = [];
    for (let i = start; i < end; i++) raw.push(Math.max(0, 1 - Math.abs((i - middle + 0.5) / reach)));
    const total = raw.reduce((sum, value) => sum + value, 0);
    return [start, raw.map((value) => Math.trunc(0.5 + (value / total) * (1 << 22)))];
  });
}

// --- Picture ---

/** Show a canvas or a video, with a square in its middle that takes a share of the shorter side. */
function show(element, width, height, share = 1) {
  source = element;
  for (const one of [$("photo"), $("video")]) one.hidden = one !== element;
  $("empty").hidden = true;
  for (const id of ["square", "sizing", "guide"]) $(id).hidden = false;
  square.side = share * Math.min(width, height);
  square.x = Math.floor((width - square.side) / 2);
  square.y = Math.floor((height - square.side) / 2);
  place();
}

const extent = () => (source === $("video") ? [source.videoWidth, source.videoHeight] : [source.width, source.height]);

/** Keep the square inside of the picture, and draw it. */
function place() {
  const [width, height] = extent();
  square.side = Math.round(Math.min(Math.max(square.side, 16), width, height));
  square.x = Math.round(Math.min(Math.max(square.x, 0), width - square.side));
  square.y = Math.round(Math.min(Math.max(square.y, 0), height - square.side));
  const { style } = $("square");
  style.left = `${(100 * square.x) / width}%`;
  style.top = `${(100 * square.y) / height}%`;
  style.width = `${(100 * square.side) / width}%`;
  $("stage").style.setProperty("--ratio", width / height);
  $("size").value = (100 * square.side) / Math.min(width, height);
  if (source === $("photo")) judge(showing);
}

/** Give the square another side around the same middle. */
function grow(side) {
  square.x += (square.side - side) / 2;
  square.y += (square.side - side) / 2;
  square.side = side;
  place();
}

const spare = document.createElement("canvas").getContext("2d", { willReadFrequently: true });

/** The square's pixels, RGBA. */
function cut() {
  const { x, y, side } = square;
  spare.canvas.width = spare.canvas.height = side;
  spare.drawImage(source, x, y, side, side, 0, 0, side, side);
  return spare.getImageData(0, 0, side, side).data;
}

/** Stop what is looked at, and forget its timeline. */
function clear() {
  showing += 1;
  const video = $("video");
  video.srcObject?.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
  if (video.src) URL.revokeObjectURL(video.src);
  video.removeAttribute("src");
  video.load();
  source = null;
  rows.length = 0;
  for (const id of ["photo", "video", "square", "sizing", "guide", "stop", "history"]) $(id).hidden = true;
  $("empty").hidden = false;
  $("best").textContent = $("speed").textContent = "\u00a0";
  for (const bar of $("bars").children) bar.replaceWith(draw(bar.dataset.name, 0));
  $("stage").style.removeProperty("--ratio");
  tell("");
  return showing;
}

async function openPhoto(file) {
  const number = clear();
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" }).catch(() => {
    throw new Error(`${file.name} is no picture that this browser can read`);
  });
  if (number !== showing) return;
  const scale = Math.min(1, EDGE / Math.max(bitmap.width, bitmap.height));
  const photo = $("photo");
  photo.width = Math.round(bitmap.width * scale);
  photo.height = Math.round(bitmap.height * scale);
  photo.getContext("2d").drawImage(bitmap, 0, 0, photo.width, photo.height);
  $("stop").hidden = false;
  show(photo, photo.width, photo.height);
}

async function openVideo(start, share) {
  const number = clear();
  const video = $("video");
  await start(video);
  await new Promise((resolve, reject) => {
    video.onloadeddata = resolve;
    video.onerror = () => reject(new Error("this browser cannot read the video"));
  });
  if (number !== showing) return;
  if (!video.videoWidth) throw new Error("the video has no pictures");
  $("history").hidden = $("stop").hidden = false;
  show(video, video.videoWidth, video.videoHeight, share);
  await video.play();
  let last = -1;
  while (number === showing && !video.ended) {
    const began = performance.now();
    if (video.currentTime !== last) {
      last = video.currentTime;
      await judge(number, last);
    }
    await new Promise((resolve) => setTimeout(resolve, Math.max(0, PAUSE - (performance.now() - began))));
  }
}

const openCamera = () => openVideo(async (video) => {
  if (!navigator.mediaDevices) throw new Error("a camera needs https, or this page on localhost");
  const wanted = { width: { ideal: 640 }, height: { ideal: 480 }, facingMode: "user" };
  video.srcObject = await navigator.mediaDevices.getUserMedia({ video: wanted, audio: false }).catch((error) => {
    throw new Error(`no camera: ${error.message}`);
  });
}, 0.6 * (1 + 2 * margin));

// --- Results ---

let busy = false;
let again = false;

/** Judge what the square holds now; while one judgement runs, further ones are put together to one. */
async function judge(number, seconds = null) {
  if (busy) {
    again = true;
    return;
  }
  busy = true;
  const began = performance.now();
  try {
    const pixels = cut();
    if (seconds !== null && !pixels[3]) return; // the video has begun, but shows nothing yet
    const probabilities = await classify(pixels, square.side);
    if (number === showing) report(probabilities, seconds, performance.now() - began);
  } catch (error) {
    tell(error.message, true);
  } finally {
    busy = false;
  }
  if (again && source === $("photo")) {
    again = false;
    await judge(showing);
  }
}

function report(probabilities, seconds, milliseconds) {
  const best = probabilities.indexOf(Math.max(...probabilities));
  $("best").textContent = names[best];
  $("best").style.setProperty("--colour", COLOURS[names[best]] ?? COLOURS.Other);
  probabilities.forEach((value, i) => $("bars").children[i].replaceWith(draw(names[i], value, i === best)));
  $("speed").textContent = `${milliseconds.toFixed(0)} ms a face`;
  if (seconds === null) return;
  rows.push([seconds, probabilities]);
  if (rows.length > KEPT) rows.shift();
  drawTimeline();
}

/** The bar of one expression. */
function draw(name, value, best = false) {
  const row = document.createElement("li");
  row.dataset.name = name;
  row.dataset.probability = value.toFixed(6);
  row.className = best ? "best" : "";
  row.style.setProperty("--colour", COLOURS[name] ?? COLOURS.Other);
  const parts = ["name", "track", "value"].map((kind) => {
    const part = document.createElement("span");
    part.className = kind;
    return part;
  });
  parts[0].textContent = name;
  parts[2].textContent = `${Math.round(100 * value)} %`;
  const bar = document.createElement("span");
  bar.style.width = `${100 * value}%`;
  parts[1].append(bar);
  row.append(...parts);
  return row;
}

/** Probabilities of the last seconds, stacked: the wider a colour, the surer. */
function drawTimeline() {
  const canvas = $("timeline");
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const end = Math.max(rows.at(-1)[0], SHOWN);
  const left = (seconds) => (width * (seconds - end + SHOWN)) / SHOWN;
  const first = Math.max(0, rows.findLastIndex(([seconds]) => seconds < end - SHOWN));
  const shown = rows.slice(first);
  let floor = shown.map(() => 0);
  names.forEach((name, i) => {
    const top = shown.map(([, probabilities], n) => floor[n] + probabilities[i]);
    context.beginPath();
    shown.forEach(([seconds], n) => context.lineTo(left(seconds), height * (1 - top[n])));
    for (let n = shown.length - 1; n >= 0; n--) context.lineTo(left(shown[n][0]), height * (1 - floor[n]));
    context.fillStyle = COLOURS[name] ?? COLOURS.Other;
    context.fill();
    floor = top;
  });
  context.fillStyle = getComputedStyle(canvas).color;
  context.font = "11px system-ui, sans-serif";
  for (let seconds = Math.ceil((end - SHOWN) / 5) * 5; seconds <= end; seconds += 5) {
    context.fillRect(left(seconds), height - 5, 1, 5);
    context.fillText(`${seconds} s`, left(seconds) + 4, height - 4);
  }
}

/** Offer the timeline as a file: seconds, the likeliest expression, and every probability. */
function save() {
  const lines = rows.map(([seconds, probabilities]) => [
    seconds.toFixed(3), names[probabilities.indexOf(Math.max(...probabilities))],
    ...probabilities.map((value) => value.toFixed(6)),
  ]);
  const text = [["seconds", "expression", ...names], ...lines].map((line) => `${line.join(",")}\n`).join("");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = "expressions.csv";
  link.click();
  URL.revokeObjectURL(link.href);
}

function tell(text, wrong = false) {
  $("message").textContent = text;
  $("message").classList.toggle("wrong", wrong);
}

/** Run one of the page's actions; tell what went wrong. */
async function attempt(action) {
  try {
    await action();
  } catch (error) {
    clear();
    tell(error.message, true);
  }
}

// --- Wiring ---

$("camera").onclick = () => attempt(openCamera);
$("stop").onclick = clear;
$("save").onclick = save;
$("file").onchange = () => attempt(async () => {
  const [file] = $("file").files;
  $("file").value = ""; // so that the same file can be opened again
  if (!file) return;
  if (!file.type.startsWith("video/")) return openPhoto(file);
  await openVideo(async (video) => { video.src = URL.createObjectURL(file); });
});
$("size").oninput = () => grow(($("size").value / 100) * Math.min(...extent()));
$("square").onpointerdown = (event) => {
  const start = { ...square, left: event.clientX, top: event.clientY };
  const scale = extent()[0] / $("stage").clientWidth;
  $("square").setPointerCapture(event.pointerId);
  $("square").onpointermove = (move) => {
    square.x = start.x + (move.clientX - start.left) * scale;
    square.y = start.y + (move.clientY - start.top) * scale;
    place();
  };
};
$("square").onpointerup = $("square").onpointercancel = () => { $("square").onpointermove = null; };
$("square").onkeydown = (event) => {
  const step = Math.max(1, square.side / 40);
  const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
  const growth = { "+": 1.05, "=": 1.05, "-": 1 / 1.05 }[event.key];
  if (growth) grow(square.side * growth);
  else if (moves[event.key]) {
    square.x += moves[event.key][0];
    square.y += moves[event.key][1];
    place();
  } else return;
  event.preventDefault();
};

try {
  await load();
  $("bars").replaceChildren(...names.map((name) => draw(name, 0)));
  $("camera").disabled = $("file").disabled = false;
  document.body.classList.add("ready");
  tell("");
} catch (error) {
  tell(`The model cannot be loaded: ${error.message}`, true);
}
