//! Tokens to syntax tree: the token cursor, module-level directives and function headers.

use super::ast::{Function, Loc, Module, Space, Statement};
use super::lex::{Kind, ParseError, Token, tokenize};

/// Result of every parsing step.
pub(super) type Parsed<T> = Result<T, ParseError>;

/// Parses one PTX file; the text ends at the first NUL or with the string.
///
/// # Errors
///
/// The first place where the text is not PTX, or uses a form this emulator does not know.
pub fn parse(source: &str) -> Result<Module, ParseError> {
    let text = &source[..source.find('\0').unwrap_or(source.len())];
    let tokens = tokenize(text)?;
    let mut parser = Parser { text, tokens, at: 0, loc: Loc::default(), registers: 0 };
    parser.module()
}

/// The cursor over the tokens of one file.
pub(super) struct Parser<'a> {
    text: &'a str,
    tokens: Vec<Token>,
    at: usize,
    /// From the last `.loc` of the current function.
    pub(super) loc: Loc,
    /// Registers declared so far in the current function.
    pub(super) registers: u64,
}

impl<'a> Parser<'a> {
    /// The current token.
    pub(super) fn token(&self) -> Token {
        self.tokens[self.at]
    }

    /// The token after the current one.
    pub(super) fn next_token(&self) -> Token {
        self.tokens[(self.at + 1).min(self.tokens.len() - 1)]
    }

    /// Steps over the current token; the end is never passed.
    pub(super) fn advance(&mut self) -> Token {
        let token = self.token();
        if token.kind != Kind::End {
            self.at += 1;
        }
        token
    }

    /// Position, for [`Self::source`].
    pub(super) fn position(&self) -> usize {
        self.at
    }

    pub(super) fn text_of(&self, token: Token) -> &'a str {
        &self.text[token.start as usize..token.end as usize]
    }

    /// The text of the current token.
    pub(super) fn text(&self) -> &'a str {
        self.text_of(self.token())
    }

    /// The tokens from `from` up to the current one as written, with each run of blanks and comments made one blank.
    pub(super) fn source(&self, from: usize) -> String {
        let mut out = String::new();
        let mut end = None;
        for &token in &self.tokens[from..self.at] {
            if end.is_some_and(|end| end != token.start) {
                out.push(' ');
            }
            out.push_str(self.text_of(token));
            end = Some(token.end);
        }
        out
    }

    /// An error at the current token.
    pub(super) fn fail<T>(&self, message: impl Into<String>) -> Parsed<T> {
        Err(ParseError { line: self.token().line, message: message.into() })
    }

    /// "expected X, found the current token".
    pub(super) fn expected<T>(&self, what: &str) -> Parsed<T> {
        if self.token().kind == Kind::End {
            return self.fail(format!("expected {what}, found the end of the text"));
        }
        let text = self.text();
        let shown: String = text.chars().take(60).collect();
        let more = if shown.len() < text.len() { "..." } else { "" };
        self.fail(format!("expected {what}, found `{shown}{more}`"))
    }

    /// Whether the current token is this punctuation character.
    pub(super) fn at_punct(&self, byte: u8) -> bool {
        self.token().kind == Kind::Punct(byte)
    }

    /// Steps over a punctuation character if it is there.
    pub(super) fn eat(&mut self, byte: u8) -> bool {
        let found = self.at_punct(byte);
        if found {
            self.advance();
        }
        found
    }

    /// Steps over a punctuation character that must be there.
    pub(super) fn expect(&mut self, byte: u8) -> Parsed<()> {
        if self.eat(byte) { Ok(()) } else { self.expected(&format!("`{}`", byte as char)) }
    }

    /// The current dotted word without its dot, when it is one.
    pub(super) fn dot(&self) -> Option<&'a str> {
        (self.token().kind == Kind::Dot).then(|| &self.text()[1..])
    }

    /// A name.
    pub(super) fn word(&mut self, what: &str) -> Parsed<&'a str> {
        if self.token().kind != Kind::Word {
            return self.expected(what);
        }
        let token = self.advance();
        Ok(self.text_of(token))
    }

    /// A string, without its quotes; escapes stay as they are.
    fn string(&mut self) -> Parsed<&'a str> {
        if self.token().kind != Kind::Str {
            return self.expected("a string");
        }
        let token = self.advance();
        let quoted = self.text_of(token);
        Ok(&quoted[1..quoted.len() - 1])
    }

    fn module(&mut self) -> Parsed<Module> {
        let mut module = Module::default();
        if self.dot() != Some("version") {
            return self.expected("`.version`, with which every PTX text begins");
        }
        while self.token().kind != Kind::End {
            let Some(directive) = self.dot() else {
                if self.eat(b';') {
                    continue;
                }
                return self.expected("a directive");
            };
            match directive {
                "version" => {
                    self.advance();
                    module.version = self.version()?;
                }
                "target" => {
                    self.advance();
                    self.word("a target such as sm_80")?.clone_into(&mut module.target);
                    while self.eat(b',') {
                        self.word("a target word")?;
                    }
                }
                "address_size" => {
                    self.advance();
                    if self.unsigned()? != 64 {
                        return self.fail(".address_size: only 64 is supported");
                    }
                }
                "alias" => {
                    self.advance();
                    let name = self.word("an alias")?.to_owned();
                    self.expect(b',')?;
                    let target = self.word("the function it stands for")?.to_owned();
                    self.expect(b';')?;
                    module.aliases.push((name, target));
                }
                _ if self.note(&mut module.files)? => {}
                _ => self.definition(&mut module)?,
            }
        }
        Ok(module)
    }

    /// `9.5`: two integers, so that 8.10 is not 8.1.
    fn version(&mut self) -> Parsed<(u32, u32)> {
        let parts = self.text().split_once('.').map(|(major, minor)| (major.parse(), minor.parse()));
        let Some((Ok(major), Ok(minor))) = parts else {
            return self.expected("a version such as 8.0");
        };
        self.advance();
        Ok((major, minor))
    }

    /// `.file`, `.section`, `.pragma` and `.loc`, which may stand anywhere; false when the directive is another one.
    pub(super) fn note(&mut self, files: &mut Vec<(u32, String)>) -> Parsed<bool> {
        match self.dot() {
            Some("file") => {
                self.advance();
                let index = self.small()?;
                files.push((index, self.string()?.to_owned()));
                // Time stamp and size.
                while self.eat(b',') {
                    self.unsigned()?;
                }
            }
            Some("section") => self.section()?,
            Some("pragma") => self.pragma()?,
            Some("loc") => {
                self.advance();
                self.loc = self.position_of_loc()?;
                while self.eat(b',') {
                    match self.word("`function_name` or `inlined_at`")? {
                        "function_name" => {
                            self.word("the label of a function's name")?;
                            if self.eat(b'+') {
                                self.unsigned()?;
                            }
                        }
                        "inlined_at" => {
                            self.position_of_loc()?;
                        }
                        other => return self.fail(format!("unknown word `{other}` in .loc")),
                    }
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// `file line column`.
    fn position_of_loc(&mut self) -> Parsed<Loc> {
        let loc = Loc { file: self.small()?, line: self.small()? };
        if self.token().kind == Kind::Number {
            self.unsigned()?;
        }
        Ok(loc)
    }

    fn pragma(&mut self) -> Parsed<()> {
        self.advance();
        self.string()?;
        while self.eat(b',') {
            self.string()?;
        }
        self.expect(b';')
    }

    /// `.section .debug_str { ... }`: what is between the braces is for debuggers.
    fn section(&mut self) -> Parsed<()> {
        let start = self.token().line;
        self.advance();
        if !matches!(self.token().kind, Kind::Dot | Kind::Word) {
            return self.expected("a section's name");
        }
        self.advance();
        self.expect(b'{')?;
        let mut depth = 1;
        while depth > 0 {
            match self.advance().kind {
                Kind::Punct(b'{') => depth += 1,
                Kind::Punct(b'}') => depth -= 1,
                Kind::End => {
                    return Err(ParseError { line: start, message: "this section does not end".to_owned() });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// A variable or function with the linkage words before it.
    fn definition(&mut self, module: &mut Module) -> Parsed<()> {
        let external = self.linkage();
        match self.dot() {
            Some("entry" | "func") => {
                let function = self.function(&mut module.files)?;
                module.functions.push(function);
            }
            Some("global" | "const" | "shared" | "shared::cta") => {
                self.variables(external, &mut |variable| module.variables.push(variable))?;
            }
            Some(other) => return self.fail(format!("`.{other}` is not a directive known at module scope")),
            None => return self.expected("`.entry`, `.func` or a variable"),
        }
        Ok(())
    }

    /// Steps over `.visible`, `.weak`, `.common` and `.extern`; true for the last two: the storage is elsewhere.
    pub(super) fn linkage(&mut self) -> bool {
        let mut external = false;
        while let Some("visible" | "weak" | "common" | "extern") = self.dot() {
            external |= self.dot() == Some("extern");
            self.advance();
        }
        external
    }

    /// `.entry name (params) directives body`, `.func (returns) name (params) directives body`.
    fn function(&mut self, files: &mut Vec<(u32, String)>) -> Parsed<Function> {
        let kernel = self.dot() == Some("entry");
        self.advance();
        self.attribute()?;
        let returns = if self.at_punct(b'(') { self.parameters()? } else { Vec::new() };
        if kernel && !returns.is_empty() {
            return self.fail("an .entry returns nothing");
        }
        let line = self.token().line;
        let name = self.word("a function's name")?.to_owned();
        let params = if self.at_punct(b'(') { self.parameters()? } else { Vec::new() };
        if kernel && params.iter().any(|parameter| parameter.size == 0 || parameter.space != Space::Param) {
            return self
                .fail(format!("`{name}`: the parameters of an .entry are .param variables with a size"));
        }
        let mut function = Function {
            name,
            kernel,
            params,
            returns,
            maxntid: None,
            reqntid: None,
            minnctapersm: None,
            maxnreg: None,
            body: None,
            line,
        };
        self.loc = Loc::default();
        self.registers = 0;
        loop {
            if self.eat(b';') {
                return Ok(function);
            }
            if self.eat(b'{') {
                function.body = Some(self.body(files)?);
                return Ok(function);
            }
            self.performance(&mut function, files)?;
        }
    }

    /// One directive between a function's header and its body.
    fn performance(&mut self, function: &mut Function, files: &mut Vec<(u32, String)>) -> Parsed<()> {
        let Some(directive) = self.dot() else {
            return self.expected("`{`, `;` or a directive of the function");
        };
        match directive {
            "maxntid" => {
                self.advance();
                function.maxntid = Some(self.three()?);
            }
            "reqntid" => {
                self.advance();
                function.reqntid = Some(self.three()?);
            }
            "minnctapersm" => {
                self.advance();
                function.minnctapersm = Some(self.small()?);
            }
            "maxnreg" => {
                self.advance();
                function.maxnreg = Some(self.small()?);
            }
            // Advice to ptxas alone.
            "maxnctapersm" | "maxclusterrank" | "abi_preserve" | "abi_preserve_control" => {
                self.advance();
                self.small()?;
            }
            "noreturn" | "unique" => {
                self.advance();
            }
            "reqnctapercluster" => {
                self.advance();
                if self.three()? != [1, 1, 1] {
                    return self.fail("clusters of more than one block are not supported");
                }
            }
            "explicitcluster" | "blocksareclusters" => {
                return self.fail(format!(".{directive}: clusters are not supported"));
            }
            "attribute" => self.attribute()?,
            _ if self.note(files)? => {}
            other => return self.fail(format!("`.{other}` is not a directive known for a function")),
        }
        Ok(())
    }

    /// `.attribute(.managed, .unified(1, 2))`, if it is there: about placement, which the emulator does not have.
    pub(super) fn attribute(&mut self) -> Parsed<()> {
        while self.dot() == Some("attribute") {
            self.advance();
            self.expect(b'(')?;
            let mut depth = 1;
            while depth > 0 {
                match self.token().kind {
                    Kind::Punct(b'(') => depth += 1,
                    Kind::Punct(b')') => depth -= 1,
                    Kind::End => return self.expected("`)`"),
                    _ => {}
                }
                self.advance();
            }
        }
        Ok(())
    }

    /// `a[, b[, c]]`, missing ones 1.
    fn three(&mut self) -> Parsed<[u32; 3]> {
        let mut sizes = [1; 3];
        for (index, size) in sizes.iter_mut().enumerate() {
            if index == 0 || self.eat(b',') {
                *size = self.small()?;
            } else {
                break;
            }
        }
        Ok(sizes)
    }

    /// The statements after a function's `{`, up to its `}`.
    fn body(&mut self, files: &mut Vec<(u32, String)>) -> Parsed<Vec<Statement>> {
        self.block(files, 0)
    }
}
