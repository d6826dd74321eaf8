"""The pages, a module for each: it asks, and gives a template what it shows.

visit         one request of somebody who is signed in, and what is read from it
stream        files of any length
overview, log, message, queue, destination, policy, report, health, search
"""
