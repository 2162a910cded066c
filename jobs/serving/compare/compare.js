// The page that compares models: its form, and what it shows of the events of a request.

import { countCaptions, showBuilder, wordsOf } from "./captions.js";
import { AMPLIFICATION, compare, decodePng, show } from "./comparison.js";

const element = (id) => document.getElementById(id);
const form = element("form");
const models = new Map();
let limits;
let selectWords;
/** What the page waits for: an AbortController, and the figures by their numbers. */
let running;

/** Says in one line what the page is doing, as `data-state` of the body does for programs. */
function say(state, text) {
  document.body.dataset.state = state;
  element("status").textContent = text;
  element("status").classList.toggle("failed", state === "failed");
  element("draw").disabled = state === "generating";
  element("stop").hidden = state !== "generating";
}

const fail = (error) => say("failed", `${error.message}.`);

/** An answer of the server; what it refuses is an error of one line. */
async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: see whether snapfusion serve still runs");
  }
  if (!answer.ok) throw new Error((await answer.json()).error);
  return answer;
}

// The form

function addRow(name) {
  element("models").append(element("row").content.cloneNode(true));
  const row = element("models").lastElementChild;
  const list = row.querySelector(".name");
  list.append(...[...models.keys()].map((each) => new Option(each)));
  list.value = name;
  list.addEventListener("change", () => fillRow(row));
  row.querySelector(".remove").addEventListener("click", () => {
    row.remove();
    showRequest();
  });
  fillRow(row);
}

/** Fills a row with what its model does unless it is told otherwise; what is part of its programs is fixed. */
function fillRow(row) {
  const facts = models.get(row.querySelector(".name").value);
  const [steps, sampler, guidance] = ["steps", "sampler", "guidance"].map((name) => row.querySelector(`.${name}`));
  Object.assign(steps, { value: facts.steps, max: facts.max_steps ?? facts.steps, disabled: !facts.max_steps });
  sampler.replaceChildren(...facts.samplers.map((name) => new Option(name)));
  Object.assign(sampler, { value: facts.sampler, disabled: facts.samplers.length === 1 });
  Object.assign(guidance, { value: facts.guidance, disabled: facts.guidance_is_fixed });
  const { low, high } = facts.guidance_range ?? {};
  const distilled = facts.guidance_range ? `distilled for ${low} to ${high}` : "";
  row.querySelector(".guidance-note").textContent = facts.guidance_is_fixed ? "part of this model" : distilled;
  row.querySelector(".facts").textContent = `${facts.runtime}; ${facts.image_size} × ${facts.image_size} pixels`;
}

/** The request that the form describes; what is fixed is left out. */
function readRequest() {
  const { caption, negative, seed, size } = Object.fromEntries(new FormData(form));
  return {
    caption,
    ...(negative && { negative }),
    seed: Number(seed),
    ...(size && { size: Number(size) }),
    models: [...element("models").children].map(readRow),
  };
}

function readRow(row) {
  const options = { name: row.querySelector(".name").value };
  for (const name of ["steps", "sampler", "guidance"]) {
    const field = row.querySelector(`.${name}`);
    if (!field.disabled) options[name] = name === "sampler" ? field.value : Number(field.value);
  }
  return options;
}

/** Shows the request as a command, and whether the miniature knows the caption. */
function showRequest() {
  const quoted = JSON.stringify(readRequest()).replaceAll("'", "'\\''");
  element("command").textContent = `curl ${new URL("api/images", location)} --json '${quoted}'`;
  element("add").disabled = element("models").children.length >= limits.images;
  const known = knownCaptions();
  if (!known) return;
  const words = wordsOf(form.caption.value, known);
  if (words) selectWords(words);
  element("unknown").hidden = Boolean(words);
  element("unknown").textContent =
    `The miniature does not know this caption, and its image of it means nothing. It knows ` +
    `${countCaptions(known).toLocaleString("en")} captions, those of the sentence above.`;
}

/** The captions of the first model that knows only some. */
const knownCaptions = () => [...models.values()].find((facts) => facts.known_captions)?.known_captions;

function prepareCaptions() {
  const known = knownCaptions();
  element("builder").hidden = !known;
  if (!known) return;
  selectWords = showBuilder(element("builder"), known, (caption) => {
    form.caption.value = caption;
  });
  form.caption.value = known.template.replace(/\{(\w+)\}/g, (_, name) => known.words[name][0]);
}

/** The address may name values of the form, as in `?caption=a+dog&seed=7`. */
function fillFromAddress() {
  for (const [name, value] of new URLSearchParams(location.search)) {
    if (["caption", "negative", "seed", "size"].includes(name)) form.elements[name].value = value;
  }
}

// The images

async function generate() {
  const request = readRequest();
  element("shown-caption").textContent = describe(request);
  for (const link of document.querySelectorAll(".download[href]")) URL.revokeObjectURL(link.href);
  element("images").replaceChildren();
  element("result").hidden = true;
  const figures = request.models.map(addFigure);
  running = new AbortController();
  say("generating", "Waiting for the server.");
  const answer = await ask("api/images", {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "application/x-ndjson" },
    body: JSON.stringify(request),
    signal: running.signal,
  });
  element("result").hidden = false;
  let first;
  let finished = false;
  for await (const event of eventsOf(answer.body)) {
    if (event.event === "waiting") say("generating", `Waiting: ${event.ahead} before this one.`);
    if (event.event === "step") showStep(event, figures[event.number]);
    if (event.event === "failed") showFailure(event, figures[event.number]);
    if (event.event === "image") {
      const pixels = await showImage(event, figures[event.number], first);
      first ??= pixels;
    }
    finished ||= event.event === "done";
  }
  if (!finished) throw new Error("The server ended before it had answered");
  say("ready", "Ready.");
}

const describe = ({ caption, negative, seed }) =>
  `“${shortened(caption)}”${negative ? `, away from “${shortened(negative)}”` : ""}, seed ${seed}`;
const shortened = (text) => (text.length > 300 ? `${text.slice(0, 300)}…` : text);

/** The lines of JSON of an answer, each as it arrives. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    yield* lines.map((line) => JSON.parse(line));
  }
}

function addFigure({ name }) {
  element("images").append(element("figure").content.cloneNode(true));
  const figure = element("images").lastElementChild;
  figure.querySelector(".name").textContent = name;
  figure.querySelector(".image").setAttribute("aria-label", `Image by ${name}`);
  return figure;
}

function showStep({ model, step, steps }, figure) {
  Object.assign(figure.querySelector("progress"), { value: step, max: steps });
  say("generating", `${model}: step ${step} of ${steps}.`);
}

function showFailure({ error }, figure) {
  figure.querySelector("progress").remove();
  figure.querySelector(".note").textContent = `${error}.`;
}

/** Shows an image, and its difference to the pixels of the first one; returns its own pixels. */
async function showImage(event, figure, first) {
  const png = Uint8Array.from(atob(event.png), (letter) => letter.charCodeAt(0));
  const pixels = await decodePng(png);
  show(figure.querySelector(".image"), pixels);
  figure.querySelector("progress").remove();
  const { steps, sampler, guidance, size, seconds } = event;
  figure.querySelector(".settings").textContent =
    `${steps} ${steps === 1 ? "step" : "steps"} of ${sampler}, guidance ${guidance}, ` +
    `${size} × ${size} pixels: ${seconds.toFixed(2)} s`;
  const flagged = event.flagged ? ["the model’s safety checker marks this image, so it is black"] : [];
  figure.querySelector(".note").textContent = [...event.notes, ...flagged].join("; ");
  Object.assign(figure.querySelector(".download"), {
    href: URL.createObjectURL(new Blob([png], { type: "image/png" })),
    download: `image-${form.seed.value}-${event.number}.png`,
    hidden: false,
  });
  if (event.difference) showDifference(event.difference, figure, pixels, first);
  return pixels;
}

function showDifference({ largest, psnr_db: decibels }, figure, pixels, first) {
  show(figure.querySelector(".difference canvas"), compare(pixels, first).difference);
  figure.querySelector(".difference-note").textContent =
    decibels === null
      ? "difference to the first: every pixel is equal"
      : `difference to the first × ${AMPLIFICATION}; at most ${largest} of 255, ${decibels.toFixed(1)} dB`;
  figure.querySelector(".difference").hidden = false;
}

async function start() {
  const answer = await (await ask("api/models")).json();
  limits = answer.limits;
  for (const facts of answer.models) models.set(facts.name, facts);
  form.caption.maxLength = form.negative.maxLength = limits.caption_characters;
  form.seed.max = limits.seed;
  prepareCaptions();
  fillFromAddress();
  [...models.keys()].slice(0, limits.images).forEach(addRow);
  form.addEventListener("input", showRequest);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    generate().catch((error) => {
      for (const bar of document.querySelectorAll("#images progress")) bar.remove();
      if (error.name === "AbortError") say("ready", "Stopped.");
      else fail(error);
    });
  });
  element("stop").addEventListener("click", () => running.abort());
  element("add").addEventListener("click", () => {
    addRow(models.keys().next().value);
    showRequest();
  });
  element("new-seed").addEventListener("click", () => {
    form.seed.value = Math.floor(Math.random() * 2 ** 31);
    showRequest();
  });
  showRequest();
  form.hidden = element("program").hidden = false;
  say("ready", "Ready.");
}

start().catch(fail);
