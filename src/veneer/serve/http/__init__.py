"""The HTTP API: routes of OpenAI, Anthropic, vLLM, SGLang, LoRAX and TGI for text, of OpenAI for images.

app.py         the application: middleware, error handlers, routers, health and metrics
service.py     objects that all routes share: engine, names, tenancy, limits, metrics; the request's principal
bodies.py      JSON bodies: size limits; unknown keys are rejected with the nearest known name
text_bodies.py bodies of the text routes, and their sampling parameters
prompts.py     texts, messages and token ids -> prompt; tokens -> texts and bytes
answers.py     runs one HTTP request on the text engine: admission, billing, metrics, cancellation
errors.py      formats an error for each API
sse.py, connection.py, metrics.py
surfaces/      one file per API, with bodies in the format of the API's clients
"""
