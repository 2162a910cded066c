// The captions that a miniature knows: a sentence with a choice of words at each of its gaps.

const GAP = /\{(\w+)\}/;

/** The words of a caption at each gap, null if it is none of them; as for the tokenizer, case does not matter. */
export function wordsOf(caption, { template, words }) {
  const escaped = (text) => text.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&");
  const pattern = template
    .split(GAP)
    .map((part, i) => (i % 2 ? `(${words[part].map(escaped).join("|")})` : escaped(part)))
    .join("");
  const found = normalized(caption).match(new RegExp(`^${pattern}$`));
  return found && found.slice(1);
}

/** The number of different captions. */
export function countCaptions({ words }) {
  return Object.values(words).reduce((product, choices) => product * choices.length, 1);
}

/** Fills `element` with the sentence, whose gaps are lists to choose from; `onChoice` receives the caption. */
export function showBuilder(element, { template, words }, onChoice) {
  const parts = template.split(GAP).map((part, i) => (i % 2 ? choice(part, words[part]) : part));
  const compose = () => parts.map((part) => part.value ?? part).join("");
  element.replaceChildren(...parts);
  element.addEventListener("input", () => onChoice(compose()));
  return (chosen) => element.querySelectorAll("select").forEach((list, i) => (list.value = chosen[i]));
}

function choice(name, values) {
  const list = document.createElement("select");
  list.setAttribute("aria-label", name);
  list.append(...values.map((value) => new Option(value)));
  return list;
}

function normalized(caption) {
  return caption.toLowerCase().trim().split(/\s+/).join(" ");
}
