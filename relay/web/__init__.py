"""The page: shows the relay in a browser, and lets operators change the queue there.

    options     its configuration: users, roles, hosts
    sessions    who is signed in, and for how long
    guard       the checks of every request: host, session, role, token
    filters     the filters of the log, as a URL has them
    rows        an event as a row of the log; `facts`: the details of an event
    story       a message from its acceptance to its end
    charts      the geometry of the charts
    queries     searches and counts for the pages, within the time that a page has
    live        the newest events, for all browsers that follow the log
    jobs        changes of the queue that take longer than a request
    pages       a module for each page
    site        the routes and the templates

The server makes the pages; nobody needs JavaScript to read them. Verbs and questions are those of
`relay.admin`, which the command line and the HTTP interface use too.
"""
