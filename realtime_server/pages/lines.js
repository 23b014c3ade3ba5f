// Ready-made lines that send to a topic or join it. Whatever the topic holds, each line can be pasted as it is.

/** `psql` on the database whose URL is in the environment. */
export function psql({ topic, isPrivate }) {
  const sql = `select realtime.send('{"hello": "world"}', 'greeting', ${sqlString(topic)}, ${isPrivate})`
  return `psql "$DATABASE_URL" -c ${doubleQuoted(sql)}`
}

/** `curl` with the public key; to a private topic, with the service key from the environment. */
export function curl({ base, anonKey, topic, isPrivate }) {
  const access = isPrivate ? ', "private": true' : ""
  const message = `"topic": ${JSON.stringify(topic)}${access},\n    "event": "greeting", "payload": {"hello": "curl"}`
  return [
    `curl ${bareOrQuoted(`${base}/realtime/v1/api/broadcast`)}`,
    `  -H ${isPrivate ? '"apikey: $SERVICE_KEY"' : singleQuoted(`apikey: ${anonKey}`)}`,
    `  -H 'content-type: application/json'`,
    `  -d ${singleQuoted(`{"messages": [{\n    ${message}}]}`)}`,
  ].join(" \\\n")
}

/** What a channel asks for to be told of the changes of a table; none without a table. */
export function changes({ schema, table, filter, event }) {
  if (!table) return []
  return [{ event, schema, table, ...(filter && { filter }) }]
}

/** Whether the module asks for a token, which is in the environment. */
export const needsToken = ({ isPrivate, table, token }) => isPrivate || Boolean(table && token)

/** A module that joins the topic with the official client. */
export function javascript(facts) {
  const { base, anonKey, topic, isPrivate } = facts
  const options = isPrivate ? ", { config: { private: true } }" : ""
  return [
    'import { createClient } from "@supabase/supabase-js"',
    "",
    "const client = createClient(",
    `  ${JSON.stringify(base)},`,
    `  ${JSON.stringify(anonKey)},`,
    ...(needsToken(facts) ? ["  { accessToken: async () => process.env.TOKEN },"] : []),
    ")",
    // Otherwise the client joins before it has the token.
    ...(needsToken(facts) ? ["await client.realtime.setAuth()"] : []),
    "client",
    `  .channel(${JSON.stringify(topic)}${options})`,
    '  .on("broadcast", { event: "*" }, console.log)',
    ...changes(facts).map((binding) => `  .on("postgres_changes",\n    ${literal(binding)},\n    console.log)`),
    "  .subscribe(console.log)",
  ].join("\n")
}

const literal = (object) =>
  `{ ${Object.entries(object).map(([name, value]) => `${name}: ${JSON.stringify(value)}`).join(", ")} }`

// PostgreSQL reads backslashes in '...' as they are.
const sqlString = (text) => `'${text.replaceAll("'", "''")}'`

const singleQuoted = (text) => `'${text.replaceAll("'", "'\\''")}'`

// An interactive shell takes ! in double quotes for its history, with a backslash or without: it goes into quotes of its own.
const doubleQuoted = (text) => `"${text.replace(/[\\"$`]/g, "\\$&").replaceAll("!", `"'!'"`)}"`

const bareOrQuoted = (text) => (/^[\w./:@%-]+$/.test(text) ? text : singleQuoted(text))
