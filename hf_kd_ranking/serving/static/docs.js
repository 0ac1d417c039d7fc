"use strict";
// Shows openapi.json: every endpoint with the fields of its request and answer. It loads nothing from other sites.

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function showFields(title, schemas) {
  const parts = [];
  for (const schema of schemas) {
    if (!schema.properties) continue;
    const rows = Object.entries(schema.properties).map(([name, field]) => make("tr", {},
      make("th", { scope: "row" }, name), make("td", {}, typeName(field)),
      make("td", {}, (schema.required || []).includes(name) ? "required" : field.default == null ? "" : `default ${field.default}`),
      make("td", {}, field.description || "")));
    parts.push(make("h3", {}, `${title}: ${schema.title}`), make("p", {}, schema.description || ""),
      make("div", { className: "fields" }, make("table", {}, make("tbody", {}, ...rows))));
  }
  return parts;
}

const lastPart = (reference) => reference.split("/").pop();

function typeName(field) {
  if (field.$ref) return lastPart(field.$ref);
  const options = field.anyOf || field.oneOf;
  if (options) return options.map(typeName).join(" or ");
  if (field.enum) return field.enum.map((value) => `"${value}"`).join(" or ");
  return field.type === "array" ? `list of ${typeName(field.items || {})}` : field.type || "any";
}

// The objects that a schema is, or is a list of.
function objects(schema, known) {
  if (!schema) return [];
  if (schema.$ref) return [known[lastPart(schema.$ref)]];
  return [schema.items, ...(schema.anyOf || []), ...(schema.oneOf || [])].flatMap((part) => objects(part, known));
}

function showEndpoint(path, method, operation, known) {
  const body = operation.requestBody?.content["application/json"].schema;
  const answer = operation.responses["200"]?.content?.["application/json"]?.schema;
  return make("section", {}, make("h2", {}, `${method.toUpperCase()} ${path}`), make("p", {}, operation.description || ""),
    ...showFields("Request", objects(body, known)), ...showFields("Answer", objects(answer, known)));
}

async function start() {
  const api = await (await fetch("openapi.json")).json();
  const known = api.components?.schemas || {};
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      document.getElementById("endpoints").append(showEndpoint(path, method, operation, known));
    }
  }
  const others = ["Document", "RerankResult", "Passage", "ErrorAnswer"].map((name) => known[name]).filter(Boolean);
  document.getElementById("endpoints").append(make("section", {}, make("h2", {}, "Objects"), ...showFields("Object", others)));
}

start().catch((error) => { document.getElementById("error").textContent = error.message; });
