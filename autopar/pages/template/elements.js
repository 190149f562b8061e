// Elements made of plain text, and numbers with units. Text from the plan only ever becomes a text node or an attribute.

const data = JSON.parse(document.getElementById("data").textContent);

/** An element with attributes and children; children are elements or texts. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") element.addEventListener("click", value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** A name that may be broken after its dots and underscores. */
function breakable(name) {
  return name.split(/(?<=[._])/).flatMap((part, index) => (index === 0 ? [part] : [make("wbr"), part]));
}

function byId(id) {
  return document.getElementById(id);
}

/** A number with so many digits after the point; halves go to the even neighbour, as in Python. */
function fixed(value, digits) {
  const doubled = value * 2 ** (digits + 1); // exact, and odd only where the value lies between two texts
  if (Number.isInteger(doubled) && Math.abs(doubled % 2) === 1) {
    const below = Math.floor(value * 10 ** digits);
    return ((below % 2 === 0 ? below : below + 1) / 10 ** digits).toFixed(digits);
  }
  return value.toFixed(digits);
}

function threeDigits(value) {
  const size = Math.abs(value);
  return fixed(value, size >= 99.95 ? 0 : size >= 9.995 ? 1 : 2);
}

/** Bytes as text, as autopar.units writes them. */
function formatBytes(nbytes) {
  let value = Number(fixed(nbytes, 0));
  if (Math.abs(value) < 1000) return `${value} B`;
  for (const prefix of "kMGTP") {
    value /= 1000;
    if (Math.abs(value) < 999.5 || prefix === "P") return `${threeDigits(value)} ${prefix}B`;
  }
}

/** Seconds as text, as autopar.units writes them. */
function formatSeconds(seconds) {
  if (Math.abs(seconds) < 0.5e-9) return "0 s";
  let value = seconds * 1e9;
  for (const unit of ["ns", "µs", "ms"]) {
    if (Math.abs(value) < 999.5) return `${threeDigits(value)} ${unit}`;
    value /= 1000;
  }
  return `${threeDigits(seconds)} s`;
}

function formatCount(value) {
  return (Number.isInteger(value) ? value.toString() : fixed(value, 1)).replace(/\B(?=(\d{3})+(?!\d))/g, ",");
}

/** A value in the unit of its column as text. */
function format(value, unit) {
  if (value === null || value === "") return "";
  if (unit === "seconds") return formatSeconds(value);
  if (unit === "bytes") return formatBytes(value);
  if (unit === "count") return formatCount(value);
  if (unit === "rate") return value >= 100 ? formatCount(Number(fixed(value, 0))) : String(Number(value.toPrecision(3)));
  if (unit === "share") return `${fixed(100 * value, 1)}%`;
  if (unit === "change") return `${value < 0 ? "" : "+"}${fixed(100 * value, 1)}%`;
  return String(value);
}
