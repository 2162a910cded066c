// Finds onnxruntime-web beside this page, and what this browser can run it on.

import { PageError } from "./files.js";

const FOLDER = new URL("./onnxruntime-web/", import.meta.url);
const SCRIPTS = { webgpu: "ort.webgpu.bundle.min.mjs", wasm: "ort.wasm.bundle.min.mjs" };

// A module with one SIMD instruction, which a browser without SIMD refuses.
const SIMD_MODULE = [
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11,
];

// An ONNX model of one Identity.
const SMALLEST_MODEL = [
  8, 8, 58, 55, 10, 16, 10, 1, 97, 18, 1, 98, 34, 8, 73, 100, 101, 110, 116, 105, 116, 121, 18, 1, 103, 90, 15, 10, 1,
  97, 18, 10, 10, 8, 8, 1, 18, 4, 10, 2, 8, 1, 98, 15, 10, 1, 98, 18, 10, 10, 8, 8, 1, 18, 4, 10, 2, 8, 1, 66, 4, 10,
  0, 16, 17,
];

/** The providers of this browser for a choice of the form, the fastest first. */
export async function providersFor(choice) {
  if (typeof WebAssembly !== "object" || !WebAssembly.validate(new Uint8Array(SIMD_MODULE))) {
    throw new PageError("This browser has no WebAssembly with SIMD, which ONNX Runtime needs: take a newer one");
  }
  if (choice === "wasm") return ["wasm"];
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  if (choice === "webgpu" && !adapter) throw new PageError("This browser has no WebGPU: take WASM");
  if (choice === "webgpu") return ["webgpu"];
  return adapter ? ["webgpu", "wasm"] : ["wasm"];
}

/** onnxruntime-web, running, with a provider; `threads` of WASM, 0 for its own choice. */
export async function loadRuntime(provider, threads) {
  const script = new URL(SCRIPTS[provider], FOLDER);
  let ort;
  try {
    ort = await import(script);
  } catch {
    throw new PageError("onnxruntime-web, which runs the model, is not beside this page", { missingRuntime: true });
  }
  // Threads need shared memory, which only a page with the headers COOP and COEP has.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? threads : 1;
  // It compiles its WASM when a first model is opened, which need not wait for the bundle's.
  const options = { executionProviders: [provider] };
  const session = await ort.InferenceSession.create(Uint8Array.from(SMALLEST_MODEL), options);
  await session.release();
  return ort;
}
