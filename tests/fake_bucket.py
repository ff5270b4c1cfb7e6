"""Cloud Storage on loopback: enough of its JSON API for gcsfs and TensorStore.

One bucket, in memory, with a door or several. A process talks to it with the
`environment` of one, and whose door it is has written what is `written` there.
"""

import email
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Callable


class Door:
  """A server of a bucket.

  Attributes:
    written: the names that were written here, in that order.
    url: of the server.
  """

  def __init__(self, bucket: 'Bucket'):
    self.written: list[str] = []
    handler = type('Handler', (_Handler,), {'bucket': bucket, 'door': self})
    self.server = _Server(('127.0.0.1', 0), handler)
    self.url = f'http://127.0.0.1:{self.server.server_port}'
    threading.Thread(target=self.server.serve_forever, daemon=True).start()

  @property
  def environment(self) -> dict[str, str]:
    """The variables that lead both clients here."""
    return {
      'STORAGE_EMULATOR_HOST': self.url,
      'TENSORSTORE_GCS_HTTP_URL': self.url,
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'x',
      'FSSPEC_GCS_TOKEN': 'anon',
      'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
    }

  def close(self) -> None:
    """Stops the server."""
    self.server.shutdown()
    self.server.server_close()


class Bucket(Door):
  """A bucket, and its first door.

  Attributes:
    objects: name -> content.
    on_write: called with the name of each object that was written.
  """

  def __init__(self):
    self.objects: dict[str, bytes] = {}
    self.generations: dict[str, int] = {}
    self.writes = 0
    self.on_write: Callable[[str], None] = lambda name: None
    self.lock = threading.RLock()
    self.uploads: dict[str, tuple[str, bytearray]] = {}
    super().__init__(self)

  def put(self, name: str, data: bytes) -> dict:
    """Writes an object, and returns what the API says about it."""
    with self.lock:
      self.objects[name] = bytes(data)
      self.writes += 1
      self.generations[name] = self.writes
      about = self.about(name)
    self.on_write(name)
    return about

  def about(self, name: str) -> dict:
    """The metadata of an object."""
    when = '2026-01-01T00:00:00.000Z'
    generation = str(self.generations[name])
    return {
      'kind': 'storage#object',
      'bucket': 'bucket',
      'name': name,
      'size': str(len(self.objects[name])),
      'generation': generation,
      'metageneration': '1',
      'timeCreated': when,
      'updated': when,
      'storageClass': 'STANDARD',
    }

  def listed(self, query: dict[str, str]) -> dict:
    """A page of the names, with as many as there are."""
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter', '')
    items, prefixes = [], set()
    with self.lock:
      for name in sorted(self.objects):
        rest = name.removeprefix(prefix)
        if not name.startswith(prefix):
          continue
        if query.get('startOffset', '') > name:
          continue
        if 'endOffset' in query and name >= query['endOffset']:
          continue
        if delimiter and delimiter in rest:
          prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
        else:
          items.append(self.about(name))
    return {'items': items, 'prefixes': sorted(prefixes)}


class _Server(http.server.ThreadingHTTPServer):
  def handle_error(self, request, client_address):
    pass  # clients that leave early


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  # An answer in one packet, sent at once: small ones would wait 40 ms.
  disable_nagle_algorithm = True
  wbufsize = -1
  bucket: Bucket
  door: Door

  def log_message(self, *args):
    pass

  def _reply(self, code, body=b'', headers=()):
    if isinstance(body, dict):
      body = json.dumps(body).encode()
    self.send_response(code)
    for key, value in headers:
      self.send_header(key, value)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def _read(self):
    if self.headers.get('Transfer-Encoding') != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length') or 0))
    body = b''
    while size := int(self.rfile.readline(), 16):
      body += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return body

  def _parts(self):
    """The object's name, or None for the bucket, and the query."""
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    found = re.search(r'/b/bucket(?:/o(?:/(.*))?)?$', url.path)
    listing = url.path.endswith('/o')
    name = found and found[1] and urllib.parse.unquote(found[1])
    return url.path, name, query, listing

  def do_GET(self):
    """Lists, describes or reads."""
    path, name, query, listing = self._parts()
    with self.bucket.lock:
      if listing:
        return self._reply(200, self.bucket.listed(query))
      if name is None and path.endswith('/b/bucket'):
        return self._reply(200, {'name': 'bucket', 'kind': 'storage#bucket'})
      if name not in self.bucket.objects:
        return self._reply(404, {'error': {'code': 404, 'message': 'none'}})
      data = self.bucket.objects[name]
      generation = self.bucket.generations[name]
      if query.get('alt') != 'media':
        return self._reply(200, self.bucket.about(name))
    if query.get('ifGenerationNotMatch') == str(generation):
      return self._reply(304)
    headers = [('x-goog-generation', str(generation))]
    span = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '')
    if not span:
      return self._reply(200, data, headers)
    first, last = int(span[1]), int(span[2] or len(data) - 1)
    if first >= len(data):
      return self._reply(416)
    part = data[first : last + 1]
    where = f'bytes {first}-{first + len(part) - 1}/{len(data)}'
    return self._reply(206, part, [*headers, ('Content-Range', where)])

  def do_POST(self):
    """Uploads in one of three ways, or copies."""
    path, name, query, _ = self._parts()
    body = self._read()
    kind = query.get('uploadType')
    if kind == 'media':
      return self._conditional(query, query['name'], body)
    if kind == 'multipart':
      head = f'Content-Type: {self.headers["Content-Type"]}\n\n'.encode()
      about, content = email.message_from_bytes(head + body).get_payload()
      name = json.loads(about.get_payload())['name']
      start = body.index(b'\n\n', body.index(b'\n--==0==')) + 2
      del content
      end = body.rindex(b'\n--==0==--')
      return self._conditional(query, name, body[start:end])
    if kind == 'resumable' and 'upload_id' not in query:
      name = query.get('name') or json.loads(body)['name']
      key = str(len(self.bucket.uploads))
      self.bucket.uploads[key] = (name, bytearray())
      where = f'{self.door.url}{self.path}&upload_id={key}'
      return self._reply(200, {}, [('Location', where)])
    if 'upload_id' in query:
      name, data = self.bucket.uploads[query['upload_id']]
      data.extend(body)
      if self.headers['Content-Range'].endswith('/*'):
        return self._reply(308, b'', [('Range', f'bytes=0-{len(data) - 1}')])
      return self._reply(200, self._put(name, data))
    copied = re.search(r'/o/(.+)/rewriteTo/b/bucket/o/(.+)$', path)
    source, target = map(urllib.parse.unquote, copied.groups())
    if source not in self.bucket.objects:
      return self._reply(404)
    about = self._put(target, self.bucket.objects[source])
    return self._reply(200, {'done': True, 'resource': about})

  do_PUT = do_POST

  def _put(self, name, data):
    self.door.written.append(name)
    return self.bucket.put(name, data)

  def _conditional(self, query, name, data):
    with self.bucket.lock:
      there = str(self.bucket.generations.get(name, 0))
      if query.get('ifGenerationMatch', there) != there:
        return self._reply(412)
      return self._reply(200, self._put(name, data))

  def do_DELETE(self):
    """Deletes an object."""
    _, name, _, _ = self._parts()
    with self.bucket.lock:
      there = self.bucket.objects.pop(name, None)
      self.bucket.generations.pop(name, None)
    self._reply(404 if there is None else 204)
