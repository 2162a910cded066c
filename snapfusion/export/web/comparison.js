// An image of this browser beside torch's, and their difference.

import { readFile } from "./files.js";

export const AMPLIFICATION = 32;

/** Shows pixels (ImageData) on a canvas; small ones stay visible as squares. */
export function show(canvas, pixels) {
  Object.assign(canvas, { width: pixels.width, height: pixels.height });
  canvas.classList.toggle("photo", pixels.width > 128);
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

/** The pixels of an image of the bundle. */
export const readPixels = async (name) => decodePng(await readFile(name));

/** The pixels of a PNG, as they were written. */
export async function decodePng(content) {
  const blob = new Blob([content], { type: "image/png" });
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height);
}

/** The difference of two images of the same size: amplified pixels, the largest of 255, and the PSNR in dB. */
export function compare(pixels, reference) {
  const difference = new ImageData(reference.width, reference.height);
  let largest = 0;
  let squares = 0;
  reference.data.forEach((value, i) => {
    const distance = Math.abs(value - pixels.data[i]);
    largest = Math.max(largest, distance);
    squares += distance ** 2;
    // Every fourth value is opacity.
    difference.data[i] = i % 4 === 3 ? 255 : AMPLIFICATION * distance;
  });
  const mean = squares / (3 * reference.width * reference.height);
  return { difference, largest, decibels: 10 * Math.log10(255 ** 2 / mean) };
}
