"""Reward models: how good is an image for a prompt?"""
