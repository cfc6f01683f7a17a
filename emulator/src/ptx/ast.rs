//! What a PTX file says, before anything is resolved: names are still text, scopes are still nested.

/// One PTX file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Module {
    /// `.version major.minor`.
    pub version: (u32, u32),
    /// First word of `.target`, for example `sm_80` or `sm_90a`.
    pub target: String,
    /// Source files by their `.file` index, for reports.
    pub files: Vec<(u32, String)>,
    /// `.global`, `.const` and `.shared` variables at module scope (also `.extern`), in file order.
    pub variables: Vec<Variable>,
    /// Kernels and device functions in file order; a declaration without a body has `body: None`.
    pub functions: Vec<Function>,
    /// `.alias name, function;` pairs.
    pub aliases: Vec<(String, String)>,
}

impl Module {
    /// The function that `name` stands for: its definition where there is one, else its declaration.
    pub fn function(&self, name: &str) -> Option<&Function> {
        let name = self.aliases.iter().find(|(alias, _)| alias == name).map_or(name, |(_, target)| target);
        let mut named = self.functions.iter().filter(|function| function.name == name);
        let first = named.clone().next();
        named.find(|function| function.body.is_some()).or(first)
    }
}

/// State spaces of variables and of memory instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// No space written: the address says which.
    Generic,
    /// `.global`.
    Global,
    /// `.shared` and `.shared::cta`.
    Shared,
    /// `.local`.
    Local,
    /// `.const`.
    Const,
    /// `.param` (kernel parameters and call arguments).
    Param,
}

/// PTX fundamental types, with the packed ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Ty {
    Pred,
    B8,
    U8,
    S8,
    B16,
    U16,
    S16,
    B32,
    U32,
    S32,
    B64,
    U64,
    S64,
    B128,
    F16,
    F16x2,
    BF16,
    BF16x2,
    TF32,
    F32,
    F64,
}

/// A `.global`, `.const`, `.shared`, `.local` or `.param` variable.
#[derive(Clone, Debug, PartialEq)]
pub struct Variable {
    /// Where it lives.
    pub space: Space,
    /// Its name, unmangled only in reports.
    pub name: String,
    /// Element type.
    pub ty: Ty,
    /// Alignment in bytes: the written `.align` of the variable itself, else the element size (the `.align` after
    /// `.ptr` describes the pointee and is ignored).
    pub align: u64,
    /// Bytes; 0 for an unsized array (`name[]`).
    pub size: u64,
    /// `.extern`: storage is decided elsewhere (for `.shared` this is the dynamic shared memory).
    pub external: bool,
    /// Initialised elements in order, shorter than the variable when the rest is zero. Empty = none written.
    pub init: Vec<Init>,
    /// Line in the file.
    pub line: u32,
}

/// One element of an initialiser.
#[derive(Clone, Debug, PartialEq)]
pub enum Init {
    /// The bits of a number, in the element's width.
    Bits(u64),
    /// The address of a symbol plus an offset; `generic(name)` when `generic` is set.
    Symbol {
        /// The symbol.
        name: String,
        /// Bytes added to its address.
        offset: i64,
        /// Whether the address is a generic one.
        generic: bool,
    },
}

/// A kernel (`.entry`) or device function (`.func`).
#[derive(Clone, Debug, PartialEq)]
pub struct Function {
    /// Its symbol.
    pub name: String,
    /// `.entry`.
    pub kernel: bool,
    /// Parameters in order (`.param`, or `.reg` for old-style functions with `space: Space::Generic`).
    pub params: Vec<Variable>,
    /// Return parameters of a `.func`.
    pub returns: Vec<Variable>,
    /// `.maxntid`, three numbers, missing ones 1.
    pub maxntid: Option<[u32; 3]>,
    /// `.reqntid`.
    pub reqntid: Option<[u32; 3]>,
    /// `.minnctapersm`.
    pub minnctapersm: Option<u32>,
    /// `.maxnreg`.
    pub maxnreg: Option<u32>,
    /// Statements; `None` for a declaration.
    pub body: Option<Vec<Statement>>,
    /// Line of the name.
    pub line: u32,
}

/// One statement of a body.
#[derive(Clone, Debug, PartialEq)]
pub enum Statement {
    /// `name:`.
    Label {
        /// The label.
        name: String,
        /// Its line.
        line: u32,
    },
    /// An instruction.
    Instruction(Box<Instruction>),
    /// `.reg .b32 %r<10>;` declares `%r0` to `%r9` (`count: Some(10)`); `.reg .b32 a, b;` gives one each with `None`.
    Register {
        /// Its type.
        ty: Ty,
        /// The name, or what numbers are appended to.
        name: String,
        /// How many registers, when they are numbered.
        count: Option<u32>,
        /// Line of the name.
        line: u32,
    },
    /// A `.shared`, `.local`, `.param`, `.const` or `.global` variable inside the body.
    Variable(Variable),
    /// `{ ... }`: names declared inside shadow outer ones.
    Block(Vec<Statement>),
    /// `name: .branchtargets a, b;`.
    BranchTargets {
        /// The label of the list.
        name: String,
        /// The targets, by index.
        labels: Vec<String>,
        /// Line of the label.
        line: u32,
    },
    /// `name: .callprototype ...;` or `name: .calltargets ...;` (kept only so that its name resolves).
    CallPrototype {
        /// The label of the prototype.
        name: String,
        /// Its line.
        line: u32,
    },
}

/// Where an instruction came from in the CUDA source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loc {
    /// Index into [`Module::files`].
    pub file: u32,
    /// Line there; 0 = unknown.
    pub line: u32,
}

/// An instruction: `@!%p1 opcode.modifier.modifier operand, operand;`.
#[derive(Clone, Debug, PartialEq)]
pub struct Instruction {
    /// `@%p` or `@!%p`: name and whether it is negated.
    pub guard: Option<(String, bool)>,
    /// `ld`, `mma`, `cp`, `bar`, ...: up to the first dot.
    pub opcode: String,
    /// The dotted words after it without the dots, `::` kept inside a word (`shared::cta`, `L2::128B`).
    pub modifiers: Vec<String>,
    /// Operands in order.
    pub operands: Vec<Operand>,
    /// Line in the PTX file (1-based).
    pub line: u32,
    /// From the last `.loc` before it.
    pub loc: Loc,
    /// The instruction as written, white space collapsed, without guard and semicolon's trailing text, for reports.
    pub text: String,
}

/// An operand.
#[derive(Clone, Debug, PartialEq)]
pub enum Operand {
    /// A register, special register (`%tid.x` in one piece), label, function or variable name.
    Name(String),
    /// `!%p`.
    Not(String),
    /// An integer literal or constant expression.
    Int {
        /// Two's complement.
        bits: u64,
        /// Written with a minus sign, or an expression with a negative value.
        negative: bool,
    },
    /// `0fXXXXXXXX`.
    F32(u32),
    /// `0dXXXXXXXXXXXXXXXX`, and decimal literals with a point or exponent.
    F64(u64),
    /// `[base+offset]`, `[base]`, `[16]` (no base).
    Address {
        /// A register or variable.
        base: Option<String>,
        /// Bytes added to it.
        offset: i64,
    },
    /// `name+8` without brackets (an address constant).
    Sum {
        /// The variable.
        name: String,
        /// Bytes added to its address.
        offset: i64,
    },
    /// `{a, b, c, d}`.
    Vector(Vec<Operand>),
    /// `%p1|%p2`, also `%r1|%p1`.
    Pair(Box<Operand>, Box<Operand>),
    /// `(a, b)` in a call.
    List(Vec<Operand>),
    /// `_`.
    Sink,
}

impl Ty {
    /// Parses the word after the dot.
    pub fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "pred" => Self::Pred,
            "b8" => Self::B8,
            "u8" => Self::U8,
            "s8" => Self::S8,
            "b16" => Self::B16,
            "u16" => Self::U16,
            "s16" => Self::S16,
            "b32" => Self::B32,
            "u32" => Self::U32,
            "s32" => Self::S32,
            "b64" => Self::B64,
            "u64" => Self::U64,
            "s64" => Self::S64,
            "b128" => Self::B128,
            "f16" => Self::F16,
            "f16x2" => Self::F16x2,
            "bf16" => Self::BF16,
            "bf16x2" => Self::BF16x2,
            "tf32" => Self::TF32,
            "f32" => Self::F32,
            "f64" => Self::F64,
            _ => return None,
        })
    }

    /// Size in bytes (a predicate counts as one).
    pub const fn size(self) -> u64 {
        match self {
            Self::Pred | Self::B8 | Self::U8 | Self::S8 => 1,
            Self::B16 | Self::U16 | Self::S16 | Self::F16 | Self::BF16 => 2,
            Self::B32 | Self::U32 | Self::S32 | Self::F16x2 | Self::BF16x2 | Self::TF32 | Self::F32 => 4,
            Self::B64 | Self::U64 | Self::S64 | Self::F64 => 8,
            Self::B128 => 16,
        }
    }

    /// `.s8` to `.s64`.
    pub const fn signed(self) -> bool {
        matches!(self, Self::S8 | Self::S16 | Self::S32 | Self::S64)
    }

    /// Any float type, packed ones too.
    pub const fn float(self) -> bool {
        matches!(
            self,
            Self::F16 | Self::F16x2 | Self::BF16 | Self::BF16x2 | Self::TF32 | Self::F32 | Self::F64
        )
    }
}
