// Text to image with the ONNX models of a bundle, in a browser or in Node.js. infra/onnx/README.md of the repository
// explains it; a test there evaluates the arithmetic between `// begin` and `// end` on test vectors.
//
// `ort` is onnxruntime-web or onnxruntime-node; `read` returns a file of the bundle as an ArrayBuffer.

/** The manifest, the sampler, the token ids of the empty caption, and the modules of a variant. */
export async function openBundle(read, variant) {
  const json = async (name) => JSON.parse(new TextDecoder().decode(await read(name)));
  const [manifest, sampler, vectors] = await Promise.all(
    ["manifest.json", "sampler.json", "vectors/vectors.json"].map(json),
  );
  const steps = sampler.steps.map((step) => ({
    t: step.t,
    tNext: step.t_next,
    fromZ: step.from_z,
    fromOutput: step.from_output,
    fromNoise: step.from_noise ?? 0,
  }));
  const { modules } = manifest.variants[variant];
  return { manifest, modules, steps, guidance: sampler.guidance, empty: vectors.token_ids[""], read };
}

/** Opens a module's model; weights above 2 GB are in a second file. */
export async function openModule(ort, bundle, name, options = {}) {
  const [model, weights] = bundle.modules[name].files;
  const beside = weights && [{ path: weights.split("/").pop(), data: new Uint8Array(await bundle.read(weights)) }];
  return ort.InferenceSession.create(new Uint8Array(await bundle.read(model)), {
    ...options,
    ...(beside && { externalData: beside }),
  });
}

/**
 * The caption's token ids, padded or truncated for the text encoder. `empty` are the ids of the empty caption in
 * vectors.json: start, end, then padding. `ids` come from the tokenizer, whether it truncates and pads or not.
 */
export function fitTokens(ids, empty) {
  const last = empty.length - 1;
  const end = empty[1];
  const padding = empty[last];
  return Int32Array.from(empty, (_, i) => {
    // begin fitTokens
    const id = i >= ids.length ? padding : i === last && ids.length > empty.length ? end : ids[i];
    // end fitTokens
    return id;
  });
}

/** The latent after a step (SnapFusion Eq. 2, 3). `outputs` are the UNet's for the empty caption, then the caption. */
export function advance(z, outputs, w, step) {
  return Float32Array.from(z, (_, i) => {
    // begin advance
    const uncond = outputs[i];
    const cond = outputs[z.length + i];
    const output = w * cond - (w - 1) * uncond;
    const next = step.fromZ * z[i] + step.fromOutput * output;
    // end advance
    return next;
  });
}

/** The latent with the fresh noise that a step of the consistency sampler adds. */
export function renoise(z, fresh, step) {
  return Float32Array.from(z, (_, i) => {
    // begin renoise
    const next = z[i] + step.fromNoise * fresh[i];
    // end renoise
    return next;
  });
}

/** An image [1,3,H,W] in 0 .. 1 as bytes of ImageData: red, green, blue, opaque. */
export function rgba(image) {
  const size = image.length / 3;
  // This array rounds halves to even, and clamps.
  const bytes = new Uint8ClampedArray(4 * size).fill(255);
  for (let channel = 0; channel < 3; channel += 1) {
    for (let i = 0; i < size; i += 1) {
      // begin rgba
      bytes[4 * i + channel] = Math.fround(255 * image[channel * size + i]);
      // end rgba
    }
  }
  return bytes;
}

/** The condition c of the empty caption, then of the caption. */
export async function encode(ort, textEncoder, rows) {
  const parts = [];
  for (const row of rows) {
    const ids = new ort.Tensor("int32", Int32Array.from(row), [1, row.length]);
    parts.push((await textEncoder.run({ token_ids: ids })).c);
  }
  const [uncond, cond] = parts.map((part) => part.data);
  const c = new Float32Array(uncond.length + cond.length);
  c.set(uncond);
  c.set(cond, uncond.length);
  return c;
}

/** All steps, from noise to the latent. `freshNoise` gives the noise that a step to a timestep adds. */
export async function denoise(ort, unet, bundle, { c, noise, freshNoise, w = bundle.guidance, onStep = () => {} }) {
  const { latent_shape: shape } = bundle.manifest;
  // begin part: one call with both conditions, or one call for each
  const part = c.length / 2 * bundle.manifest.conditions;
  // end part
  const conditionShape = bundle.modules.unet.inputs.c.shape;
  // With w = 1 the output of the empty caption, which comes first, counts for nothing.
  const begin = w === 1 && bundle.manifest.conditions === 1 ? part : 0;
  let z = noise;
  for (const [number, step] of bundle.steps.entries()) {
    const outputs = new Float32Array(2 * z.length);
    for (let first = begin; first < c.length; first += part) {
      const { output } = await unet.run({
        z_t: new ort.Tensor("float32", z, [1, ...shape]),
        t: new ort.Tensor("float32", [step.t], [1]),
        c: new ort.Tensor("float32", c.slice(first, first + part), conditionShape),
      });
      outputs.set(output.data, (first / part) * output.data.length);
    }
    z = advance(z, outputs, w, step);
    if (step.fromNoise) z = renoise(z, freshNoise(step.tNext), step);
    onStep(number + 1);
  }
  return z;
}

/** The image [1,3,H,W] of a latent. */
export async function decode(ort, decoder, bundle, latent) {
  const shape = [1, ...bundle.manifest.latent_shape];
  const { image } = await decoder.run({ latent: new ort.Tensor("float32", latent, shape) });
  return image.data;
}

/** The image [1,3,H,W] of token ids: the empty caption's, then the caption's. */
export async function generate(ort, bundle, { rows, noise, freshNoise, w = bundle.guidance, options = {} }) {
  // One model at a time, so that memory holds the largest and not all three.
  const use = async (name, compute) => {
    const session = await openModule(ort, bundle, name, options);
    try {
      return await compute(session);
    } finally {
      await session.release();
    }
  };
  const c = await use("text_encoder", (session) => encode(ort, session, rows));
  const latent = await use("unet", (session) => denoise(ort, session, bundle, { c, noise, freshNoise, w }));
  return use("decoder", (session) => decode(ort, session, bundle, latent));
}
