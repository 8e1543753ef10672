// A small part of Markdown as DOM nodes: fenced code, headings, lists, bold, italic and inline code.
// Text only ever enters the page through textContent, so nothing a model writes becomes an element.

const FENCE = /^ {0,3}(```+|~~~+)\s*([^`\s]*)[^`]*$/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;

// Show `text` in `element`, keeping the nodes of blocks that have not changed: an answer that grows redraws
// its last block, and a selection further up survives.
export function render(element, text, plain) {
  const blocks = plain ? [{ kind: "plain", source: text, text }] : split(text);
  blocks.forEach((block, i) => {
    const old = element.children[i];
    const mark = block.kind + "\n" + block.source;
    if (old && old.mark === mark) return;
    const node = build(block);
    node.mark = mark;
    if (old) old.replaceWith(node);
    else element.append(node);
  });
  while (element.children.length > blocks.length) element.lastElementChild.remove();
}

// Blocks of a text: {kind: code | heading | list | text, source, ...}. An open fence runs to the end.
export function split(text) {
  const lines = text.split("\n");
  const blocks = [];
  let i = 0;
  while (i < lines.length) {
    const from = i;
    const fence = FENCE.exec(lines[i]);
    const heading = HEADING.exec(lines[i]);
    let block;
    if (fence) {
      const end = new RegExp("^ {0,3}" + fence[1][0] + "{" + fence[1].length + ",}\\s*$");
      for (i++; i < lines.length && !end.test(lines[i]); i++);
      block = { kind: "code", language: fence[2], text: lines.slice(from + 1, i).join("\n") };
      i++;
    } else if (heading) {
      block = { kind: "heading", level: heading[1].length, text: heading[2] };
      i++;
    } else if (ITEM.test(lines[i])) {
      const items = [];
      for (; i < lines.length && lines[i].trim() && !FENCE.test(lines[i]); i++) {
        const item = ITEM.exec(lines[i]);
        if (item) items.push({ depth: item[1].length, marker: item[2], text: item[3] });
        else items[items.length - 1].text += "\n" + lines[i].trim(); // a line that goes on
      }
      block = { kind: "list", items };
    } else if (!lines[i].trim()) {
      i++;
      continue;
    } else {
      const ends = (line) => !line.trim() || FENCE.test(line) || HEADING.test(line) || ITEM.test(line);
      for (i++; i < lines.length && !ends(lines[i]); i++);
      block = { kind: "text", text: lines.slice(from, i).join("\n") };
    }
    blocks.push({ ...block, source: lines.slice(from, i).join("\n") });
  }
  return blocks;
}

function build(block) {
  if (block.kind === "plain") return make("pre", "plain", block.text);
  if (block.kind === "code") {
    const figure = make("figure", "code");
    const bar = make("figcaption", "", block.language || "text");
    const button = make("button", "", "Copy");
    button.type = "button";
    button.addEventListener("click", async () => {
      button.textContent = await copy(block.text) ? "Copied" : "Not copied";
    });
    bar.append(button);
    const pre = make("pre");
    pre.tabIndex = 0; // long lines scroll: by keyboard, too
    pre.append(make("code", "", block.text));
    figure.append(bar, pre);
    return figure;
  }
  if (block.kind === "heading") return inline(make("h" + Math.min(6, block.level + 2)), block.text);
  if (block.kind === "list") return list(block.items, 0).node;
  return inline(make("p"), block.text);
}

// The items from `at` on that are as deep as the first, deeper ones as lists inside them.
function list(items, at) {
  const { depth, marker } = items[at];
  const ordered = /\d/.test(marker);
  const node = make(ordered ? "ol" : "ul");
  if (ordered) node.start = parseInt(marker, 10);
  while (at < items.length && items[at].depth >= depth) {
    if (items[at].depth > depth && node.lastElementChild) {
      const inner = list(items, at);
      node.lastElementChild.append(inner.node);
      at = inner.at;
    } else {
      node.append(inline(make("li"), items[at].text));
      at++;
    }
  }
  return { node, at };
}

// Spans end within their line and 500 characters: no text, however odd, takes long to search.
const INLINE = /(`+)([^`]|[^`].{0,500}?[^`])\1(?!`)|\*\*(?=\S)(.{0,500}?\S)\*\*|(?<![*\w])\*(?=[^\s*])([^*\n]{0,500}[^\s*])\*(?![*\w])/g;

function inline(node, text) {
  let end = 0;
  for (const found of text.matchAll(INLINE)) {
    node.append(text.slice(end, found.index));
    if (found[1]) node.append(make("code", "", found[2]));
    else node.append(inline(make(found[3] ? "strong" : "em"), found[3] || found[4]));
    end = found.index + found[0].length;
  }
  node.append(text.slice(end));
  return node;
}

// Whether the text is in the clipboard now: a page from afar without TLS may not.
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

export function make(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text) node.textContent = text;
  return node;
}
