// Finds onnxruntime-web beside this page, and what this browser can run it on.

import { PageError } from "./files.js";

const FOLDER = new URL("./onnxruntime-web/", import.meta.url);
const SCRIPTS = { webgpu: "ort.webgpu.bundle.min.mjs", wasm: "ort.wasm.bundle.min.mjs" };

// A module with one SIMD instruction, which a browser without SIMD refuses.
const SIMD_MODULE = [
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11,
];

/** The providers of this browser, the fastest first. */
export async function availableProviders() {
  if (typeof WebAssembly !== "object" || !WebAssembly.validate(new Uint8Array(SIMD_MODULE))) {
    throw new PageError("This browser has no WebAssembly with SIMD, which ONNX Runtime needs: take a newer one");
  }
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return adapter ? ["webgpu", "wasm"] : ["wasm"];
}

/** onnxruntime-web with a provider; `threads` of WASM, 0 for its own choice. */
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
  return ort;
}
