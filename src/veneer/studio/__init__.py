"""Studio: the page where people look at adapters, compare them, train them and let them go live, over one server's own
library, engine, jobs and routes. It keeps nothing: what is on a page is in its link, the library, the jobs or the
tenants' database.
"""
