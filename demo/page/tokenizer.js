// BERT's tokenizer: texts to the token ids that the program makes of them.
//
// What becomes of a character (lower case, without accents, a word of its own, nothing) stands in characters.json, which
// build.py made with the program's own tokenizer: browsers and tokenizers know different versions of Unicode.

export class Tokenizer {
  constructor({ pieces, prefix, unknown, longest_word, special, around, characters, max_length }) {
    Object.assign(this, { prefix, longest_word, around, max_length });
    this.ids = new Map(pieces);
    this.unknown = this.ids.get(unknown);
    this.special = new Map(special);
    this.characters = new Map(characters.mapped);
    for (const [first, last] of characters.removed)
      for (let point = first; point <= last; point++) this.characters.set(String.fromCodePoint(point), "");
    for (const [first, last] of characters.isolated)
      for (let point = first; point <= last; point++) {
        const character = String.fromCodePoint(point);
        this.characters.set(character, ` ${character} `);
      }
    const escaped = [...this.special.keys()].map((token) => token.replace(/[^\w]/g, "\\$&"));
    this.splitter = new RegExp(`(${escaped.join("|")})`);
  }

  // The ids of a text without special tokens around it. Special tokens within it are themselves.
  textIds(text) {
    return text.split(this.splitter).flatMap((part) => {
      if (this.special.has(part)) return this.special.get(part);
      const normalized = [...part].map((character) => this.characters.get(character) ?? character).join("");
      return normalized.split(" ").filter(Boolean).flatMap((word) => this.wordIds([...word]));
    });
  }

  // The longest piece first, then the longest of what is left; unknown if something has no piece.
  wordIds(letters) {
    const ids = [];
    if (letters.length > this.longest_word) return [this.unknown];
    for (let start = 0, end; start < letters.length; start = end) {
      const id = () => this.ids.get((start ? this.prefix : "") + letters.slice(start, end).join(""));
      for (end = letters.length; end > start && id() === undefined; ) end--;
      if (end === start) return [this.unknown];
      ids.push(id());
    }
    return ids;
  }

  // A sequence of one text or two: its ids, and how many of them are of token type 0.
  encode(texts) {
    const [before, ...behind] = this.around[texts.length];
    const parts = truncate(texts.map((text) => this.textIds(text)), this.max_length - this.around[texts.length].flat().length);
    const ids = [...before];
    const ends = parts.map((part, i) => ids.push(...part, ...behind[i]));
    return { ids, first: ends[0] };
  }
}

// Shortened at the end of the longest first, of several the last, to so many tokens together.
function truncate(parts, budget) {
  const lengths = parts.map((part) => part.length);
  while (lengths.reduce((a, b) => a + b) > budget) lengths[lengths.lastIndexOf(Math.max(...lengths))]--;
  return parts.map((part, i) => part.slice(0, lengths[i]));
}
