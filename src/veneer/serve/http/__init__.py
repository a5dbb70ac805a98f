"""The HTTP API: OpenAI's, vLLM's, SGLang's, LoRAX's and TGI's routes for text, OpenAI's for images.

app.py         the application: middleware, error handlers, routers, health and metrics
service.py     objects that all routes share: engine, names, tenancy, limits, metrics; the request's principal
bodies.py      JSON bodies: size limits, unknown keys rejected with the nearest name
text_bodies.py bodies of the text routes, and their sampling parameters
prompts.py     texts, messages and token ids -> prompt; tokens -> texts and bytes
answers.py     one HTTP request through the text engine: admitted, billed, measured, cancelled on disconnect
errors.py      one error in each API's format
sse.py, connection.py, metrics.py
surfaces/      one file per API, with bodies in its clients' format
"""
