//! `vm-scrub bench` from outside: what it prints, what it writes, and how it ends. Memory is tiny, and no figure is looked at.

mod command;
mod exports;
mod interrupted;
mod json;
