// Reads the bundle's files, which lie beside this page's folder, and says what is wrong with one.

const BUNDLE = new URL("../", import.meta.url);

/** What a reader of the page can act on; `missingRuntime` if by adding onnxruntime-web. */
export class PageError extends Error {
  constructor(message, { missingRuntime = false } = {}) {
    super(message);
    this.missingRuntime = missingRuntime;
  }
}

/** A file of the bundle as an ArrayBuffer. */
export async function readFile(name) {
  let answer;
  try {
    answer = await fetch(new URL(name, BUNDLE));
  } catch {
    throw new PageError(`${name} cannot be fetched: the server of this page does not answer`);
  }
  if (!answer.ok) {
    throw new PageError(`${name} is missing (HTTP ${answer.status}): this page belongs into web/ of a whole bundle`);
  }
  return answer.arrayBuffer();
}

/** A JSON file of the bundle. */
export async function readJson(name) {
  const text = new TextDecoder().decode(await readFile(name));
  try {
    return JSON.parse(text);
  } catch {
    throw new PageError(`${name} is not JSON: copy the bundle again`);
  }
}

/** A reader of files that compares each with its hash in the manifest, where the browser can compute one. */
export function checkedReader(manifest) {
  return async (name) => {
    const content = await readFile(name);
    const expected = manifest.files[name]?.sha256;
    // Pages of other hosts than this machine have no `crypto.subtle` without HTTPS.
    if (crypto.subtle && expected && (await sha256(content)) !== expected) {
      throw new PageError(`${name} is not the file that the manifest records: copy the bundle again`);
    }
    return content;
  };
}

/** The same reader, which begins to read these files at once, and keeps each until it is asked for. */
export function readAhead(read, names) {
  const begun = new Map(names.map((name) => [name, read(name)]));
  // Whoever needs a file hears of its fault.
  for (const content of begun.values()) content.catch(() => {});
  return (name) => {
    const content = begun.get(name) ?? read(name);
    begun.delete(name);
    return content;
  };
}

async function sha256(content) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
