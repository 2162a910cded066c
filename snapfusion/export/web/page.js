// The page: its form, and what it shows of the worker's images.

import { countCaptions, showBuilder, wordsOf } from "./captions.js";
import { AMPLIFICATION, compare, readPixels, show } from "./comparison.js";
import { PageError, readFile, readJson } from "./files.js";
import { rgba } from "./text_to_image.js";

const RUNTIME = "ONNX Runtime";
const PREFERRED = "onnx-float16";
const GUIDANCE_WITHOUT_RANGE = { low: 1, high: 20 };
const MODULES = { text_encoder: "Text encoder", unet: "UNet", decoder: "Decoder" };
const PROVIDERS = { webgpu: "WebGPU", wasm: "WASM" };

const element = (id) => document.getElementById(id);
const form = element("form");
let bundle;
let worker;
let opened;

/** Says in one line what the page is doing, as `data-state` of the body does for programs. */
function say(state, text) {
  document.body.dataset.state = state;
  element("status").textContent = text;
  element("status").classList.toggle("failed", state === "failed");
  element("draw").disabled = state !== "ready";
}

async function fail(error) {
  worker?.terminate();
  say("failed", `${error.message}.`);
  if (error.missingRuntime) await showHowToGetRuntime();
}

async function showHowToGetRuntime() {
  const lines = new TextDecoder().decode(await readFile("web/onnxruntime-web.sha256")).trim().split("\n");
  element("runtime-package").textContent = lines[0].replace("# ", "");
  element("runtime-files").textContent = lines.slice(1).map((line) => line.split(/ +/)[1]).join("\n");
  element("missing-runtime").hidden = false;
}

// The worker

/** Sends one message to the worker and waits for its answer; `onStep` hears of each step. */
function ask(message, onStep = () => {}) {
  return new Promise((resolve, reject) => {
    worker.onmessage = ({ data }) => {
      if (data.failed) reject(new PageError(data.failed.message, data.failed));
      else if (data.step) onStep(data.step);
      else resolve(data.opened ?? data.drawn);
    };
    worker.onerror = () => reject(new PageError("web/worker.js is missing, or this browser is too old for it"));
    worker.postMessage(message);
  });
}

async function openModel() {
  worker?.terminate();
  worker = new Worker("worker.js", { type: "module" });
  const { variant, provider, threads } = Object.fromEntries(new FormData(form));
  say("opening", `Loading ${variant}, ${megabytes(bytesOf(variant))} MB.`);
  opened = await ask({ open: { manifest: bundle.manifest, variant, provider, threads: Number(threads) } });
  performance.mark("ready");
  say("ready", `Ready. ${describeProvider()}.`);
}

function describeProvider() {
  const { provider, threads, version } = opened;
  const of = provider === "wasm" ? `${threads} ${threads === 1 ? "thread" : "threads"} of WASM` : PROVIDERS[provider];
  return `The model runs on ${of} in onnxruntime-web ${version}`;
}

// The form

function fillForm() {
  const { manifest, sampler } = bundle;
  const variants = Object.keys(manifest.variants).filter((name) => manifest.variants[name].runtime === RUNTIME);
  if (variants.length === 0) throw new PageError("This bundle has no ONNX models: compile it with mobile.onnx");
  form.variant.append(...variants.map((name) => new Option(manifest.variants[name].weights, name)));
  form.variant.value = variants.includes(PREFERRED) ? PREFERRED : variants[0];
  const cores = self.crossOriginIsolated ? navigator.hardwareConcurrency : 1;
  const counts = Array.from({ length: cores }, (_, i) => i + 1);
  form.threads.append(new Option("automatic", 0), ...counts.map((count) => new Option(count)));
  fillGuidance();
  element("steps").textContent = sampler.steps.length;
  const distilled = manifest.distillation?.steps;
  element("steps-note").textContent = distilled ? `distilled for ${distilled}` : "of this bundle’s sampler";
  setRequest({ caption: manifest.captions[0], seed: gateSeed(), guidance: sampler.guidance });
  fillFromAddress();
}

/** Guidance is within what the student was distilled for; where it is a constant of the programs, it is fixed. */
function fillGuidance() {
  const { distillation, folded_guidance: folded } = bundle.manifest;
  const range = distillation?.cfg_range;
  const { low, high } = folded === undefined ? (range ?? GUIDANCE_WITHOUT_RANGE) : { low: 1, high: 1 };
  Object.assign(form.guidance, { min: low, max: high, disabled: folded !== undefined });
  const distilled = range ? `distilled for ${low} to ${high}` : "";
  element("guidance-range").textContent = folded === undefined ? distilled : "compiled into this bundle";
}

const shownGuidance = (w) => bundle.manifest.folded_guidance ?? w;

const gateSeed = () => bundle.manifest.identity.settings.seed;

function setRequest({ caption, seed, guidance }) {
  Object.assign(form.caption, { value: caption });
  Object.assign(form.seed, { value: seed });
  Object.assign(form.guidance, { value: guidance });
}

/** The address may name values of the form, as in `?seed=7&variant=onnx`. */
function fillFromAddress() {
  for (const [name, value] of new URLSearchParams(location.search)) {
    const field = form.elements[name];
    if (!field) continue;
    const before = field.value;
    field.value = value;
    // A list has no such choice.
    if (field.value === "" && name !== "caption") field.value = before;
  }
}

function prepareCaptions() {
  const known = bundle.manifest.known_captions;
  const select = known && showBuilder(element("builder"), known, (caption) => {
    form.caption.value = caption;
  });
  const check = () => {
    element("guidance-value").textContent = shownGuidance(Number(form.guidance.value));
    if (!known) return;
    const words = wordsOf(form.caption.value, known);
    if (words) select(words);
    element("unknown").hidden = Boolean(words);
    element("unknown").textContent =
      `The miniature does not know this caption, and its image of it means nothing. It knows ` +
      `${countCaptions(known).toLocaleString("en")} captions, those of the sentence above.`;
  };
  element("builder").hidden = !known;
  form.addEventListener("input", check);
  check();
}

function listGateCaptions() {
  const buttons = bundle.manifest.captions.map((caption) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: caption });
    button.addEventListener("click", () => {
      setRequest({ caption, seed: gateSeed(), guidance: bundle.sampler.guidance });
      form.dispatchEvent(new Event("input"));
      form.requestSubmit();
    });
    const item = document.createElement("li");
    item.append(button);
    return item;
  });
  element("gate-captions").replaceChildren(...buttons);
}

// The image

async function draw() {
  if (document.body.dataset.state !== "ready") return;
  const request = { caption: form.caption.value, seed: Number(form.seed.value), guidance: Number(form.guidance.value) };
  const total = bundle.sampler.steps.length;
  say("drawing", "Drawing.");
  const drawn = await ask({ draw: request }, (step) => say("drawing", `Drawing: step ${step} of ${total}.`));
  const size = bundle.manifest.image_size;
  const pixels = new ImageData(rgba(drawn.image), size, size);
  show(element("image"), pixels);
  element("drawn-caption").textContent =
    `“${shortened(request.caption)}”, seed ${request.seed}, guidance ${shownGuidance(request.guidance)}`;
  offerDownload(request);
  showTruncation(drawn.tokens);
  await showReference(request, pixels);
  showTimes(drawn.times, request);
  element("result").hidden = false;
  say("ready", `Ready. ${describeProvider()}.`);
}

const shortened = (caption) => (caption.length > 300 ? `${caption.slice(0, 300)}…` : caption);

function offerDownload({ seed }) {
  Object.assign(element("download"), { href: element("image").toDataURL("image/png"), download: `image-${seed}.png` });
}

function showTruncation({ given, read }) {
  element("truncated").hidden = given <= read;
  element("truncated").textContent = `The caption has ${given} tokens, and only the first ${read} are read.`;
}

/** Shows torch's image and the difference, if the gate drew the same. */
async function showReference({ caption, seed, guidance }, pixels) {
  const { manifest, sampler } = bundle;
  const number = seed === gateSeed() && guidance === sampler.guidance ? manifest.captions.indexOf(caption) : -1;
  for (const figure of document.querySelectorAll("figure.compared")) figure.hidden = number < 0;
  if (number < 0) return;
  const reference = await readPixels(`pictures/torch-${number}.png`);
  const { difference, largest, decibels } = compare(pixels, reference);
  show(element("reference"), reference);
  show(element("difference"), difference);
  element("difference-note").textContent =
    largest === 0 ? "every pixel is equal" : `× ${AMPLIFICATION}; at most ${largest} of 255, ${decibels.toFixed(1)} dB`;
}

function showTimes(times, { guidance }) {
  const { manifest, sampler } = bundle;
  const { modules } = manifest.variants[form.variant.value];
  const callsPerStep = manifest.conditions === 1 && guidance !== 1 ? 2 : 1;
  const calls = { text_encoder: 2, unet: callsPerStep * sampler.steps.length, decoder: 1 };
  const oneDecimal = (value) => (value === undefined ? "" : value.toFixed(1));
  const rows = Object.entries(MODULES).map(([name, label]) => [
    label,
    calls[name],
    oneDecimal(times[name]),
    oneDecimal(opened.load[name]),
    oneDecimal(opened.decibels?.[name]),
    megabytes(modules[name].bytes),
  ]);
  const sum = (values) => Object.values(values).reduce((total, value) => total + value, 0);
  const opening = opened.kept ? sum(opened.load) : undefined;
  const size = megabytes(bytesOf(form.variant.value));
  rows.push(["Together", "", oneDecimal(sum(times)), oneDecimal(opening), "", size]);
  element("times").querySelector("tbody").replaceChildren(...rows.map(tableRow));
  element("times").querySelector("tbody").lastElementChild.className = "total";
  const seconds = performance.getEntriesByName("ready").at(0).startTime / 1000;
  element("runs-on").textContent =
    `${describeProvider()}. The page was ready after ${seconds.toFixed(2)} s. ` +
    "“To torch” is the PSNR of this device’s results to the bundle’s test vectors.";
  element("times").hidden = false;
}

function tableRow(values) {
  const row = document.createElement("tr");
  values.forEach((value, i) => {
    row.append(Object.assign(document.createElement("td"), { textContent: value, className: i ? "number" : "" }));
  });
  return row;
}

const bytesOf = (variant) =>
  Object.values(bundle.manifest.variants[variant].modules).reduce((sum, module) => sum + module.bytes, 0);
const megabytes = (bytes) => (bytes / 1e6).toFixed(2);

// The facts around it

function showFacts() {
  const { manifest, sampler } = bundle;
  const side = manifest.image_size;
  element("summary").textContent =
    `${side} × ${side} pixels in ${sampler.steps.length} steps, by the ONNX models of this bundle. ` +
    "Model and caption stay here: nothing is sent to any server.";
  const { weights, data } = manifest.identity.licence;
  const check = manifest.safety_checker
    ? "The bundle’s safety checker runs in ExecuTorch only: images are not checked here."
    : "Images are not checked: this bundle has no safety checker.";
  const lines = [check, `Licences: weights, ${weights}; data, ${data}.`];
  const paragraphs = lines.map((text) => Object.assign(document.createElement("p"), { textContent: text }));
  const links = document.createElement("p");
  for (const name of ["MODEL_CARD.md", "manifest.json", "sampler.json"]) {
    links.append(Object.assign(document.createElement("a"), { href: `../${name}`, textContent: name }), " ");
  }
  element("footer").replaceChildren(...paragraphs, links);
}

async function start() {
  say("opening", "Loading.");
  const [manifest, sampler] = await Promise.all(["manifest.json", "sampler.json"].map(readJson));
  bundle = { manifest, sampler };
  showFacts();
  fillForm();
  prepareCaptions();
  listGateCaptions();
  form.hidden = false;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    draw().catch(fail);
  });
  for (const name of ["variant", "provider", "threads"]) {
    form.elements[name].addEventListener("change", () => openModel().catch(fail));
  }
  element("new-seed").addEventListener("click", () => {
    form.seed.value = Math.floor(Math.random() * 2 ** 31);
  });
  await openModel();
  // A large model draws when it is told to.
  if (opened.kept) await draw();
}

start().catch(fail);
