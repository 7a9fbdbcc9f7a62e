// Elements made of text only: nothing that comes from a log is ever read as markup.

const SVG = "http://www.w3.org/2000/svg";

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const make = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);

export const draw = (tag, attributes = {}, ...children) => filled(document.createElementNS(SVG, tag), attributes, children);

export const by = (id) => document.getElementById(id);

// A name of unknown script and direction, which must not turn the text around it.
export const named = (text, attributes = {}) => make("bdi", attributes, text);

export const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
