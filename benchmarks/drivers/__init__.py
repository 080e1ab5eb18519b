"""Ways to serve requests to an app inside this process, cheapest first.

``direct`` calls the app as a server would and throws the answer away. ``protocol`` drives the
real server's own HTTP code over memory: what a request costs there is close to what it costs on
the real server, without the noise of sockets.
"""
