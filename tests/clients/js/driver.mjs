// Drives one unmodified supabase-js or realtime-js client for the tests.
//
// JSON commands come one a line on stdin, each with an `id` and a `do`; each is answered by one line
// {"reply": id, "ok": true, ...} or {"reply": id, "ok": false, "error": "..."}. What the client reports goes out as
// {"event": "...", ...} lines, in the order in which the client called back. Commands start in the order of their
// lines and do not wait for each other. ../py/driver.py speaks the same language.
//
// The newest supabase-js declares Node >= 22, where WebSocket is global: with `transport: ws` it runs on Node 18 and 20
// too, and only warns on stderr.
import { createInterface } from 'node:readline'
import { parseArgs } from 'node:util'
import WebSocket from 'ws'

const PACKAGES = { newest: '@supabase/supabase-js', 2.39: 'supabase-js-2-39', 'realtime-js': '@supabase/realtime-js' }
const OPEN_LIMIT_MS = 10_000

const { lib } = parseArgs({ options: { lib: { type: 'string', default: 'newest' } } }).values
const { createClient, RealtimeClient, postgresChangesFilter } = await import(PACKAGES[lib])

let client = null
let token = null
const channels = new Map()

// stdout carries the protocol; what the library prints belongs on stderr.
console.log = console.info = console.debug = console.error

function write(message) {
  const line = JSON.stringify(message, (_key, value) =>
    value instanceof ArrayBuffer ? { base64: Buffer.from(value).toString('base64') } : value
  )
  process.stdout.write(line + '\n')
}

function words(error) {
  if (error === undefined || error === null) return null
  return error instanceof Error ? error.message : typeof error === 'string' ? error : JSON.stringify(error)
}

// A browser logs what a message handler throws and goes on; Node would end the process.
process.on('uncaughtException', (error) => {
  console.error(error)
  write({ event: 'client_error', error: words(error) })
})
process.on('unhandledRejection', (error) => {
  console.error(error)
  write({ event: 'client_error', error: words(error) })
})

function known(name) {
  const channel = channels.get(name)
  if (!channel) throw new Error(`no channel ${name}: subscribe first`)
  return channel
}

// The client takes an ArrayBuffer for binary; a Buffer or a typed array would be sent as JSON.
function payloadOf({ payload, base64 }) {
  return base64 === undefined ? payload : Uint8Array.from(Buffer.from(base64, 'base64')).buffer
}

// A list of calls, [["eq", "name", "a,b"], ...], stands for what the client's own builder makes of them.
function filterOf({ filter, ...binding }) {
  if (!Array.isArray(filter)) return filter === undefined ? binding : { ...binding, filter }
  const builder = postgresChangesFilter()
  for (const [method, ...given] of filter) builder[method](...given)
  return { ...binding, filter: builder }
}

function listen(channel, name, { broadcast = [], presence = false, postgres_changes = [] }) {
  for (const event of broadcast) {
    channel.on('broadcast', { event }, (message) => write({ event: 'broadcast', channel: name, message }))
  }
  if (presence) {
    for (const kind of ['sync', 'join', 'leave']) {
      channel.on('presence', { event: kind }, (change) =>
        write({
          event: 'presence',
          channel: name,
          kind,
          state: channel.presenceState(),
          key: change?.key,
          current: change?.currentPresences,
          new: change?.newPresences,
          left: change?.leftPresences,
        })
      )
    }
  }
  postgres_changes.forEach((filter, binding) =>
    channel.on('postgres_changes', filterOf(filter), (payload) =>
      write({ event: 'postgres_changes', channel: name, binding, payload })
    )
  )
  channel.on('system', {}, (payload) => write({ event: 'system', channel: name, payload }))
}

const commands = {
  // Makes the client; the socket opens at the first `subscribe` or at `open`, as in an application.
  async connect({ url, key, token: given = null, options = {} }) {
    token = given
    if (lib === 'newest') {
      // Without the callback, the client forgets the token of realtime.setAuth() as soon as it connects, and rejoins with
      // the API key: its default callback knows only sessions of supabase.auth.
      client = createClient(url, key, {
        realtime: { transport: WebSocket, ...options },
        accessToken: async () => token,
      })
    } else if (lib === 'realtime-js') {
      // The client by itself, in the shape in which supabase-js holds it.
      const realtime = new RealtimeClient(`${url}/realtime/v1`, {
        params: { apikey: key },
        transport: WebSocket,
        accessToken: async () => token ?? key,
        ...options,
      })
      client = {
        realtime,
        channel: (topic, config) => realtime.channel(topic, config),
        removeChannel: (channel) => realtime.removeChannel(channel),
        removeAllChannels: () => realtime.removeAllChannels(),
      }
    } else {
      // No transport here: 2.39 attaches its handlers only to a socket that it chose itself, which on Node is `ws`.
      client = createClient(url, key, { realtime: options, auth: { persistSession: false, autoRefreshToken: false } })
    }
    if (token) await client.realtime.setAuth(token)
  },

  async open() {
    client.realtime.connect()
    const end = Date.now() + OPEN_LIMIT_MS
    while (!client.realtime.isConnected()) {
      if (Date.now() > end) throw new Error(`the socket did not open within ${OPEN_LIMIT_MS} ms`)
      await new Promise((resume) => setTimeout(resume, 20))
    }
  },

  // A channel that does not join: for `http_send`, and for the REST fallback of `send`.
  async channel({ channel: name, topic, config = {} }) {
    channels.set(name, client.channel(topic, { config }))
  },

  async subscribe({ channel: name, topic, config = {}, wait = true, ...listeners }) {
    if (topic !== undefined) channels.set(name, client.channel(topic, { config }))
    const channel = known(name)
    listen(channel, name, listeners)
    let first = null
    const joined = new Promise((resolve) => {
      first = wait ? resolve : null
    })
    channel.subscribe((status, error) => {
      const report = { status, error: words(error) }
      if (first) {
        first(report)
        first = null
      } else {
        write({ event: 'status', channel: name, ...report })
      }
    })
    return wait ? await joined : {}
  },

  async send({ channel, event, persist, ...content }) {
    const message = { type: 'broadcast', event, payload: payloadOf(content) }
    if (persist !== undefined) message.persist = persist
    return { result: await known(channel).send(message) }
  },

  async http_send({ channel: name, event, persist, ...content }) {
    const channel = known(name)
    if (!channel.httpSend) throw new Error('this version of the client has no httpSend')
    return { result: await channel.httpSend(event, payloadOf(content), { persist }) }
  },

  async track({ channel, payload }) {
    return { result: await known(channel).track(payload) }
  },

  async untrack({ channel }) {
    return { result: await known(channel).untrack() }
  },

  async presence_state({ channel }) {
    return { state: known(channel).presenceState() }
  },

  async set_auth({ token: given }) {
    token = given
    await client.realtime.setAuth(token)
  },

  async unsubscribe({ channel: name }) {
    const channel = known(name)
    const result = await channel.unsubscribe()
    if (channels.get(name) === channel) channels.delete(name)
    return { result }
  },

  async remove_all() {
    const result = await client.removeAllChannels()
    channels.clear()
    return { result }
  },

  async disconnect() {
    await client.realtime.disconnect()
  },

  async status() {
    return { connected: client.realtime.isConnected() }
  },

  async exit() {
    setImmediate(() => process.exit(0))
  },
}

async function run(line) {
  const { id, do: name, ...rest } = JSON.parse(line)
  try {
    const command = commands[name]
    if (!command) throw new Error(`unknown command: ${name}`)
    if (!client && !['connect', 'exit'].includes(name)) throw new Error('connect first')
    write({ reply: id, ok: true, ...(await command(rest)) })
  } catch (error) {
    write({ reply: id, ok: false, error: words(error) ?? 'the client threw nothing' })
  }
}

createInterface({ input: process.stdin })
  .on('line', run)
  .on('close', () => process.exit(0))
