// Compares what each module computes on this device with the bundle's test vectors, which are torch's: when the bundle
// was made, its models ran on another processor, and float16 was computed in float32.

const LEAST_DECIBELS = 20;

/** The PSNR of each module's output in dB, peak = max |reference|. Throws if one is below the bundle's limit. */
export async function checkModules(ort, bundle, sessions) {
  const { arrays } = JSON.parse(new TextDecoder().decode(await bundle.read("vectors/vectors.json")));
  const vector = async (name) => {
    const content = await bundle.read(`vectors/${arrays[name].file}`);
    return name === "token_ids" ? new Int32Array(content) : new Float32Array(content);
  };
  const last = bundle.steps.length - 1;
  const names = ["token_ids", "c", "noise", "output-0", `z-${last}`, "image"];
  const [ids, c, noise, output, latent, image] = await Promise.all(names.map(vector));
  const samples = {
    text_encoder: [{ token_ids: ids }, c],
    unet: [{ z_t: noise, t: Float32Array.of(bundle.steps[0].t), c }, output],
    decoder: [{ latent }, image],
  };
  const decibels = {};
  for (const [name, [inputs, expected]] of Object.entries(samples)) {
    decibels[name] = psnr(await run(ort, bundle.modules[name], sessions[name], inputs), expected);
    const limit = Math.max(bundle.modules[name].parity.limit_db, LEAST_DECIBELS);
    if (!(decibels[name] >= limit)) {
      const found = `${decibels[name].toFixed(1)} dB`;
      throw new Error(`${name} gives other results on this device than its test vectors (${found})`);
    }
  }
  return decibels;
}

/** The first output for the beginning of each array, as much of it as the module's input takes. */
async function run(ort, module, session, inputs) {
  const feeds = {};
  for (const [port, { shape, kind }] of Object.entries(module.inputs)) {
    const count = shape.reduce((product, side) => product * side, 1);
    feeds[port] = new ort.Tensor(kind === "int32" ? "int32" : "float32", inputs[port].slice(0, count), shape);
  }
  return Object.values(await session.run(feeds))[0].data;
}

/** Of values and the reference's first ones. */
function psnr(values, reference) {
  let peak = 0;
  let squares = 0;
  values.forEach((value, i) => {
    peak = Math.max(peak, Math.abs(reference[i]));
    squares += (value - reference[i]) ** 2;
  });
  return 10 * Math.log10(peak ** 2 / (squares / values.length));
}
