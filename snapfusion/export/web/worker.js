// Runs the model beside the page, which stays usable meanwhile.
//
// Takes {open: {manifest, variant, provider, threads}} and {draw: {caption, seed, guidance}}, and answers {opened},
// {step}, {drawn} or {failed}.

import { checkModules } from "./device_check.js";
import { PageError, checkedReader, readAhead } from "./files.js";
import { gaussian, noiseKey, stepNoise } from "./noise.js";
import { availableProviders, loadRuntime } from "./runtime.js";
import { decode, denoise, encode, fitTokens, openBundle, openModule } from "./text_to_image.js";
import { clipTokenizer } from "./tokenizer.js";

const MODULES = ["text_encoder", "unet", "decoder"];
const TOKENIZER = "tokenizer/tokenizer.json";
const DESCRIPTIONS = ["manifest.json", "sampler.json", "vectors/vectors.json", TOKENIZER];
// Models above this size are opened for each image, one at a time, so that memory holds the largest only.
const KEPT_BYTES = 2 ** 29;

let model;

async function timed(work) {
  const began = performance.now();
  const result = await work();
  return [result, performance.now() - began];
}

async function open({ manifest, variant, provider, threads }) {
  const { modules } = manifest.variants[variant];
  const kept = MODULES.reduce((sum, name) => sum + modules[name].bytes, 0) <= KEPT_BYTES;
  const first = [...DESCRIPTIONS, ...(kept ? MODULES.flatMap((name) => modules[name].files) : [])];
  const read = readAhead(checkedReader(manifest), first);
  const providers = await availableProviders();
  if (provider !== "auto" && !providers.includes(provider)) {
    throw new PageError("This browser has no WebGPU: take WASM");
  }
  const candidates = provider === "auto" ? providers : [provider];
  for (const candidate of candidates) {
    try {
      return await openWith(candidate, { read, variant, threads, kept });
    } catch (error) {
      // The last one's error counts; a missing file is missing for all.
      if (error instanceof PageError || candidate === candidates.at(-1)) throw error;
    }
  }
}

async function openWith(provider, { read, variant, threads, kept }) {
  const ort = await loadRuntime(provider, threads);
  const bundle = await openBundle(read, variant);
  const tokenize = clipTokenizer(JSON.parse(new TextDecoder().decode(await read(TOKENIZER))));
  model = { ort, bundle, tokenize, options: { executionProviders: [provider] }, sessions: {}, kept };
  const opened = { provider, kept, load: {} };
  if (kept) {
    for (const name of MODULES) {
      [model.sessions[name], opened.load[name]] = await timed(() => openModule(ort, bundle, name, model.options));
    }
    opened.decibels = await checkModules(ort, bundle, model.sessions);
  }
  // Only now the runtime has chosen its threads.
  return { ...opened, threads: ort.env.wasm.numThreads, version: ort.env.versions.web };
}

/** The result of `compute` with a module's session, which is closed again if the models are too large to be kept. */
async function use(name, compute) {
  const { ort, bundle, options, sessions, kept } = model;
  if (kept) return compute(sessions[name]);
  const session = await openModule(ort, bundle, name, options);
  try {
    return await compute(session);
  } finally {
    await session.release();
  }
}

async function draw({ caption, seed, guidance }) {
  const { ort, bundle, tokenize } = model;
  const ids = tokenize(caption);
  const rows = [bundle.empty, fitTokens(ids, bundle.empty)];
  const count = bundle.manifest.latent_shape.reduce((product, side) => product * side, 1);
  const key = noiseKey(seed, caption, 0);
  const noise = gaussian(key, count);
  const freshNoise = stepNoise(key, count);
  const [c, encoding] = await use("text_encoder", (session) => timed(() => encode(ort, session, rows)));
  const onStep = (done) => postMessage({ step: done });
  const [latent, denoising] = await use("unet", (session) =>
    timed(() => denoise(ort, session, bundle, { c, noise, freshNoise, w: guidance, onStep })),
  );
  const [image, decoding] = await use("decoder", (session) => timed(() => decode(ort, session, bundle, latent)));
  if (!image.every(Number.isFinite)) throw new PageError("the image has values that are not finite");
  // Start and end are not the caption's own.
  const tokens = { given: ids.length - 2, read: bundle.empty.length - 2 };
  return { image, tokens, times: { text_encoder: encoding, unet: denoising, decoder: decoding } };
}

onmessage = async ({ data }) => {
  try {
    if (data.open) postMessage({ opened: await open(data.open) });
    else postMessage({ drawn: await draw(data.draw) });
  } catch (error) {
    postMessage({ failed: { message: error.message, missingRuntime: Boolean(error.missingRuntime) } });
  }
};
