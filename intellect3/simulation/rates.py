"""How fast a server decodes: the time that running requests take for a number of tokens each.

With b requests and c cached tokens in all, a step takes `base(b) + k c` seconds, gives every
request one token and so makes c grow by b. For x steps, x real:

    seconds(x) = (base(b) + k c) x + k b x^2 / 2

which has a closed inverse: a simulated server needs one event a request, none a token.
"""

import math

import numpy as np

from intellect3.simulation import scenario


class Rates:
  """The decode speed of a server; tables are looked up once for each number of requests.

  Args:
    servers: with the measured table.
  """

  def __init__(self, servers: scenario.Servers) -> None:
    running = np.arange(1, servers.max_running + 1)
    tokens_per_second = np.interp(running, servers.decode_batch, servers.decode_tokens_per_second)
    self._base = [0.0, *(running / tokens_per_second).tolist()]
    self._per_cached = servers.seconds_per_cached_token

  def seconds(self, steps: float, running: int, cached: float) -> float:
    """Seconds until each of `running` requests has `steps` more tokens.

    Args:
      steps: tokens of each request.
      running: requests, at least 1.
      cached: tokens of all of them in the cache at the start.
    """
    slope = self._per_cached
    return (self._base[running] + slope * cached) * steps + 0.5 * slope * running * steps * steps

  def steps(self, seconds: float, running: int, cached: float) -> float:
    """Tokens that each of `running` requests gets in so many seconds: inverse of `seconds`."""
    slope = self._per_cached
    first = self._base[running] + slope * cached
    if slope == 0.0:
      return seconds / first
    root = math.sqrt(first * first + 2.0 * slope * running * seconds)
    return 2.0 * seconds / (first + root)
