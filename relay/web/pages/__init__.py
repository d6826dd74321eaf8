"""The pages. A module for each reads what the page shows, and gives it to a template.

visit         one request of a user who is signed in
stream        files of any length
overview, log, message, queue, destination, policy, report, health, search
"""
