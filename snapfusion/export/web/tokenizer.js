// CLIP's tokenizer, from the `tokenizer.json` of a bundle. Differs from general tokenizers of JavaScript in lower case
// and spaces, which follow the Rust library that the bundle's ids come from.

// The split of GPT-2 into words, which tokenizers of bytes apply.
const GPT2 = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+/gu;
const WORD_END = "</w>";

/**
 * A function from a caption to its token ids: start, words, end; neither truncated nor padded.
 *
 * `definition` is the content of `tokenizer/tokenizer.json`. Throws if it is not of CLIP's kind.
 */
export function clipTokenizer(definition) {
  const { model, added_tokens: added, post_processor: ends, pre_tokenizer: split } = definition;
  if (model.type !== "BPE" || model.end_of_word_suffix !== WORD_END || ends?.type !== "RobertaProcessing") {
    throw new Error("tokenizer.json is not of CLIP's kind");
  }
  const words = unicodePattern(split.pretokenizers[0].pattern.Regex);
  const encodePiece = bytePairEncoder(model);
  const encodeWords = (text) =>
    (text.match(words) ?? []).flatMap((word) => word.match(GPT2) ?? []).flatMap(encodePiece);
  // Tokens of textual inversions are found in the normalized text, start and end in the text as it was written.
  const verbatim = added.filter((token) => !token.normalized);
  const inverted = added.filter((token) => token.normalized);
  const encodeNormalized = (text) => encodeAround(inverted, normalize, text, encodeWords);
  const encodePart = (part) => encodeNormalized(normalize(part));
  const encodeText = (text) => encodeAround(verbatim, (content) => content, text, encodePart);
  return (caption) => [ends.cls[1], ...encodeText(writeVectors(caption, added)), ends.sep[1]];
}

/** A pattern of the Rust library: there `\s` is Unicode's white space, which JavaScript's is not quite. */
function unicodePattern(source) {
  return new RegExp(source.replaceAll("\\s", "\\p{White_Space}"), "gu");
}

function normalize(text) {
  const spaced = text.normalize("NFC").replace(/\p{White_Space}+/gu, " ");
  // Letter by letter: in a whole word JavaScript would write the last capital sigma differently.
  return Array.from(spaced, (letter) => letter.toLowerCase()).join("");
}

/** The ids of a text: those of the added tokens in it, and between them what `encode` gives. */
function encodeAround(tokens, written, text, encode) {
  const idOf = new Map(tokens.map((token) => [written(token.content), token.id]));
  if (idOf.size === 0) return encode(text);
  return text
    .split(new RegExp(`(${longestFirst(idOf.keys())})`, "u"))
    .flatMap((part, i) => (i % 2 ? [idOf.get(part)] : part ? encode(part) : []));
}

/** A pattern of any of these names; the longest first, so that TOKEN_1 is not read as TOKEN. */
function longestFirst(names) {
  const escaped = (name) => name.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&");
  return [...names].sort((a, b) => b.length - a.length).map(escaped).join("|");
}

/** The caption with `TOKEN TOKEN_1 ...` for the TOKEN of a textual inversion of several vectors. */
function writeVectors(caption, added) {
  const names = new Set(added.map((token) => token.content.toLowerCase()));
  const vectors = (name) => {
    const all = [name];
    while (names.has(`${name}_${all.length}`)) all.push(`${name}_${all.length}`);
    return all.join(" ");
  };
  if (names.size === 0) return caption;
  return caption.replace(new RegExp(longestFirst(names), "giu"), (found) => {
    const text = vectors(found.toLowerCase());
    return text.includes(" ") ? text : found;
  });
}

/** A function from a word to the ids of its bytes, joined by the merges; words are remembered. */
function bytePairEncoder({ vocab, merges, unk_token: unknown }) {
  const rank = new Map(merges.map((pair, i) => [Array.isArray(pair) ? pair.join(" ") : pair, i]));
  const letters = byteLetters();
  const known = new Map();
  return (word) => {
    if (!known.has(word)) {
      const symbols = Array.from(new TextEncoder().encode(word), (byte) => letters[byte]);
      symbols.push(symbols.pop() + WORD_END);
      known.set(word, joined(symbols, rank).map((symbol) => vocab[symbol] ?? vocab[unknown]));
    }
    return known.get(word);
  };
}

/** The symbols after all merges, the one of lowest rank first. */
function joined(symbols, rank) {
  for (;;) {
    const ranks = symbols.slice(1).map((symbol, i) => rank.get(`${symbols[i]} ${symbol}`) ?? Infinity);
    const lowest = Math.min(...ranks);
    if (lowest === Infinity) return symbols;
    const at = ranks.indexOf(lowest);
    symbols.splice(at, 2, symbols[at] + symbols[at + 1]);
  }
}

/** A printable letter for each byte, as GPT-2 has them: printable bytes are themselves. */
function byteLetters() {
  const printable = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  let others = 0;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(printable(byte) ? byte : 256 + others++));
}
