// Gaussian noise of a caption and a seed: the numbers of `snapfusion generate` (snapfusion/noise.py), on any machine.

const MASK = (1n << 64n) - 1n;

/** The key of the parts, as in `noise_key`: BLAKE2b of their JSON, as 63 bits. */
export function noiseKey(...parts) {
  return blake2b64(new TextEncoder().encode(pythonJson(parts))) >> 1n;
}

/** `count` unit Gaussians of a key: Philox's bits as uniform numbers, and the inverse of the normal distribution. */
export function gaussian(key, count) {
  const normals = new Float32Array(count);
  for (let i = 0; i < count; i += 4) {
    // NumPy increments the counter before it uses it.
    const bits = philox([BigInt(i / 4 + 1), 0n, 0n, 0n], [key & MASK, key >> 64n]);
    const uniform = bits.map((word) => (Number(word >> 11n) + 0.5) * 2 ** -53);
    normals.set(uniform.slice(0, count - i).map(inverseNormal), i);
  }
  return normals;
}

/** The noise that a step to timestep t adds to the image of a key, as `step_noise` draws it. */
export function stepNoise(key, count) {
  return (t) => gaussian(noiseKey("step", key, t), count);
}

/** JSON of strings and whole numbers as Python's `json.dumps` writes it: in ASCII, with a space after commas. */
function pythonJson(parts) {
  const escape = (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`;
  // A lone half of a surrogate pair, too, is what JSON.stringify and Python escape alike.
  const json = (part) => (typeof part === "bigint" ? String(part) : JSON.stringify(part));
  return `[${parts.map((part) => json(part).replace(/[\x7f-\uffff]/g, escape)).join(", ")}]`;
}

// BLAKE2b (RFC 7693), without a key, for a digest of 8 bytes.

const IV = [
  0x6a09e667f3bcc908n, 0xbb67ae8584caa73bn, 0x3c6ef372fe94f82bn, 0xa54ff53a5f1d36f1n,
  0x510e527fade682d1n, 0x9b05688c2b3e6c1fn, 0x1f83d9abfb41bd6bn, 0x5be0cd19137e2179n,
];
const SIGMA = [
  [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3],
  [11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4], [7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8],
  [9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13], [2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9],
  [12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11], [13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10],
  [6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5], [10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0],
];
const COLUMNS_AND_DIAGONALS = [
  [0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15],
  [0, 5, 10, 15], [1, 6, 11, 12], [2, 7, 8, 13], [3, 4, 9, 14],
];
const BLOCK_BYTES = 128;
const DIGEST_BYTES = 8n;

const rotate = (word, bits) => ((word >> bits) | (word << (64n - bits))) & MASK;

function blake2b64(message) {
  const h = [...IV];
  h[0] ^= 0x01010000n ^ DIGEST_BYTES;
  const blocks = Math.max(1, Math.ceil(message.length / BLOCK_BYTES));
  for (let number = 0; number < blocks; number += 1) {
    const block = new Uint8Array(BLOCK_BYTES);
    block.set(message.subarray(number * BLOCK_BYTES, (number + 1) * BLOCK_BYTES));
    const last = number === blocks - 1;
    compress(h, block, BigInt(last ? message.length : (number + 1) * BLOCK_BYTES), last);
  }
  return h[0];
}

function compress(h, block, bytesRead, last) {
  const view = new DataView(block.buffer);
  const m = Array.from({ length: 16 }, (_, i) => view.getBigUint64(8 * i, true));
  const v = [...h, ...IV];
  v[12] ^= bytesRead;
  if (last) v[14] ^= MASK;
  for (let round = 0; round < 12; round += 1) {
    const order = SIGMA[round % 10];
    COLUMNS_AND_DIAGONALS.forEach(([a, b, c, d], i) => {
      v[a] = (v[a] + v[b] + m[order[2 * i]]) & MASK;
      v[d] = rotate(v[d] ^ v[a], 32n);
      v[c] = (v[c] + v[d]) & MASK;
      v[b] = rotate(v[b] ^ v[c], 24n);
      v[a] = (v[a] + v[b] + m[order[2 * i + 1]]) & MASK;
      v[d] = rotate(v[d] ^ v[a], 16n);
      v[c] = (v[c] + v[d]) & MASK;
      v[b] = rotate(v[b] ^ v[c], 63n);
    });
  }
  for (let i = 0; i < 8; i += 1) h[i] ^= v[i] ^ v[i + 8];
}

/** Four random words of 64 bits: Philox 4x64 of ten rounds (Salmon et al. 2011). */
function philox(counter, key) {
  let [c0, c1, c2, c3] = counter;
  let [k0, k1] = key;
  for (let round = 0; round < 10; round += 1) {
    const first = 0xd2e7470ee14c6c93n * c0;
    const second = 0xca5a826395121157n * c2;
    [c0, c1, c2, c3] = [(second >> 64n) ^ c1 ^ k0, second & MASK, (first >> 64n) ^ c3 ^ k1, first & MASK];
    k0 = (k0 + 0x9e3779b97f4a7c15n) & MASK;
    k1 = (k1 + 0xbb67ae8584caa73bn) & MASK;
  }
  return [c0, c1, c2, c3];
}

// The inverse of the normal distribution by algorithm AS 241 (Wichura 1988): three quotients of polynomials, whose
// coefficients are given from the highest power to the constant.

const CENTER = [
  [
    2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
    1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.387132872796366608,
  ],
  [
    5.226495278852854561e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
    5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1,
  ],
];
const MIDDLE = [
  [
    7.7454501427834140764e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258,
    3.64784832476320460504, 5.76949722146069140550, 4.63033784615654529590, 1.42343711074968357734,
  ],
  [
    1.05075007164441684324e-9, 5.475938084995344946e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
    6.89767334985100004550e-1, 1.67638483018380384940, 2.05319162663775882187, 1,
  ],
];
const TAIL = [
  [
    2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2,
    2.96560571828504891230e-1, 1.78482653991729133580, 5.46378491116411436990, 6.65790464350110377720,
  ],
  [
    2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4,
    1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1,
  ],
];

const polynomial = (coefficients, x) => coefficients.reduce((sum, coefficient) => sum * x + coefficient, 0);
const quotient = ([above, below], x) => polynomial(above, x) / polynomial(below, x);

function inverseNormal(p) {
  const q = p - 0.5;
  if (Math.abs(q) <= 0.425) return q * quotient(CENTER, 0.180625 - q * q);
  const r = Math.sqrt(-Math.log(Math.min(p, 1 - p)));
  return Math.sign(q) * (r <= 5 ? quotient(MIDDLE, r - 1.6) : quotient(TAIL, r - 5));
}
