"""The page: where people look at the relay, and act on it, with a browser.

    options     what the configuration says of it: users, roles, hosts
    sessions    who is signed in, and for how long
    guard       what every request goes through: host, session, role, token
    filters     the log's filters, as they stand in a URL
    rows        an event as a row, and facts, what stands behind it
    story       a message from its acceptance to its end
    charts      the geometry of the pictures
    answers     the answers to what the pages ask, within the time that a page has
    live        the newest events, for all that follow the log
    jobs        changes of the queue that take longer than a request
    pages       a module for each page
    site        the routes, and the templates

Pages are made here on the server and need no JavaScript to be read. Every verb and every question
is that of `relay.admin`, which the command line and the HTTP interface use too.
"""
